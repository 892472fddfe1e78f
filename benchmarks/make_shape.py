"""Write a real shape with random weights as a GGUF file, for engines that need one.

    python benchmarks/make_shape.py llama-3.2-1b q4_0 OUT.gguf

The weights are those of `edgellama bench --shape NAME --type FORMAT`; the vocabulary is a toy of the
right size. Tensors are written one by one, so that memory holds one of them.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import gguf
import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))
from edgellama.errors import UsageError
from edgellama.gguf.synthetic import SHAPES, SyntheticFile, synthetic
from edgellama.kernels.blocks import FORMATS
from tests.make_gguf import VOCABULARIES, add_metadata


def write(model: SyntheticFile, path: Path) -> None:
    """Stream a model to disk."""
    arch = model.metadata["general.architecture"]
    writer = gguf.GGUFWriter(path, arch)
    n_vocab = model.tensors["token_embd.weight"].shape[1]
    vocabulary = VOCABULARIES["spm" if arch == "gemma3" else "bpe"](n_vocab)
    metadata = {k: v for k, v in model.metadata.items() if k != "general.architecture"}
    add_metadata(writer, metadata | vocabulary)
    for name, info in model.tensors.items():
        writer.add_tensor_info(
            name, info.shape[::-1], np.dtype(np.float32), info.nbytes,
            raw_dtype=gguf.GGMLQuantizationType(info.type_id),
        )  # fmt: skip
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for name in model.tensors:
        writer.write_tensor_data(model.data(name))
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("shape", help=", ".join(SHAPES))
    parser.add_argument("format", help=", ".join(FORMATS))
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    try:
        model = synthetic(arguments.shape, arguments.format)
    except UsageError as error:
        parser.error(str(error))
    write(model, arguments.out)


if __name__ == "__main__":
    main()
