"""Decode with guesses and without, on texts that repeat their prompt and on texts that do not.

    python benchmarks/speculation.py MODEL.gguf [--draft lookup] [-t 2] [-r 3]

Every prompt is answered turn by turn with both, the answers are compared, and medians printed as rows
of Markdown for `LOG.md`.  Without a chat template the prompt is continued as it stands.
"""

from __future__ import annotations

import argparse
import statistics

from edgellama import LLM

TEXT = (
    "The library on Mill Street was opened in 1931 by the mayor, Ada Penrose, who had collected the "
    "money for it herself. For twenty years it had one room, one stove and one librarian, a retired "
    "sailor called Tom Hale. In 1952 the river rose and took half of the books. The people of the town "
    "dried what was left on their washing lines, page by page, and brought most of it back. Today the "
    "library has three floors, a cellar that is kept dry by two pumps, and a window with the names of "
    "everybody who helped."
)
CODE = """def area(width, height):
    if width < 0 or height < 0:
        raise ValueError("sizes must not be negative")
    return width * height

def volume(width, height, depth):
    if width < 0 or height < 0 or depth < 0:
        raise ValueError("sizes must not be negative")
    return width * height * depth
"""
PROMPTS = {
    "rewrite": f"Copy the following text and change every 'library' to 'museum':\n\n{TEXT}",
    "summarise": f"Summarise the following text in three sentences:\n\n{TEXT}",
    "code": f"Add a docstring to each function of this code and print the whole code:\n\n{CODE}",
    "story": "Write a short story about a lighthouse keeper and a storm.",
}


def main() -> None:
    """Print a row per prompt and temperature."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--draft", default="lookup")
    parser.add_argument("-t", "--threads", type=int, default=2)
    parser.add_argument("-r", "--repeats", type=int, default=3)
    parser.add_argument("-n", "--n-predict", type=int, default=160)
    arguments = parser.parse_args()
    options = {"n_ctx": 1024, "n_threads": arguments.threads}
    plain = LLM(arguments.model, **options)
    guessing = LLM(arguments.model, draft=arguments.draft, **options)
    print("| prompt | temperature | tokens | plain, tok/s | guessing, tok/s | | accepted |")
    print("|---|---|---|---|---|---|---|")
    for name, prompt in PROMPTS.items():
        for temperature in (0.0, 0.8):
            rates: list[list[float]] = [[], []]
            answers = []
            for turn in range(arguments.repeats + 1):
                for i, llm in enumerate((plain, guessing)):
                    said = llm.generate(
                        prompt if llm.template is None
                        else llm.render_chat([{"role": "user", "content": prompt}]),
                        max_tokens=arguments.n_predict, temperature=temperature, seed=1,
                    )  # fmt: skip
                    answers.append(said.tokens)
                    if turn:  # the first warms up
                        rates[i].append(
                            (len(said.tokens) - 1) / max(said.timings.predicted_s, 1e-9)
                        )
            if any(answer != answers[0] for answer in answers):
                raise SystemExit(f"{name}: guesses changed the answer")
            if len(answers[0]) < 2:
                continue  # the model had nothing to say
            a, b = (statistics.median(r) for r in rates)
            t = said.timings
            share = f"{t.accepted_n} of {t.drafted_n} ({t.accepted_n / max(t.drafted_n, 1):.0%})"
            n = len(answers[0])
            print(f"| {name} | {temperature} | {n} | {a:.0f} | {b:.0f} | {b / a:.2f} | {share} |")
    guessing.close()
    plain.close()


if __name__ == "__main__":
    main()
