"""Chats: messages in, a prompt out; an answer in, its text, reasoning and tool calls out.

    template.py   the model's template, in a sandbox
    messages.py   what a message and a tool may look like
    prompt.py     which template, which options: messages to token ids, and how to read the answer
    reasoning.py  <think> ... </think> at the beginning of an answer
    tools.py      calls of tools in an answer

Nothing here runs a model; `llm.py` does.
"""

from .messages import ToolCall
from .prompt import CHAT_OPTIONS, Chat, ChatPrompt
from .template import ChatTemplate

__all__ = ["CHAT_OPTIONS", "Chat", "ChatPrompt", "ChatTemplate", "ToolCall"]
