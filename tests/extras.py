"""What an installation with one extra must do; run by `make test-extras` in an environment that has nothing else.

python tests/extras.py "[bench]"
"""

from __future__ import annotations

import importlib
import subprocess
import sys
import tempfile
from pathlib import Path

BRINGS = {
    "": [],
    "[bench]": ["matplotlib"],
    "[image-data]": ["easy_vqa", "PIL"],
    "[kernels]": ["kernels"],
    "[recipes]": ["trl", "datasets", "sklearn", "PIL"],
    "[dev]": ["pytest", "xdist", "build", "gguf", "mypy", "pdoc"],
}
SNIPPET = """
import hf_attn, torch
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, vocab_size=99)
model = LlamaForCausalLM(LlamaConfig(**sizes)).eval()
hf_attn.apply(model, "moba", block_size=16, top_k=2, min_seq_len=0)
model(torch.arange(96)[None])
assert hf_attn.stats(model)["totals"]["sparse_calls"] == 2, hf_attn.stats(model)
"""


def main() -> None:
    extra = sys.argv[1]
    for name in BRINGS[extra]:
        importlib.import_module(name)
    command = [str(Path(sys.executable).with_name("hf-attn"))]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([sys.executable, "-c", SNIPPET], check=True, cwd=folder)
        subprocess.run([*command, "list"], check=True, cwd=folder, stdout=subprocess.DEVNULL)
        measure = ["bench", "op", "linear_attention", "--lengths", "128", "--dtype", "fp32", "--passes", "forward"]
        if extra in ("[bench]", "[dev]"):
            subprocess.run([*command, *measure, "--report", "page.html"], check=True, cwd=folder)
            assert (Path(folder) / "page.html").stat().st_size > 1000
        else:
            refused = subprocess.run([*command, *measure, "--report", "page.html"], cwd=folder, capture_output=True)
            assert refused.returncode == 2 and b"hf-attn[bench]" in refused.stderr, refused.stderr
    print(f"{extra or 'no extra'}: fine")


if __name__ == "__main__":
    main()
