"""Push to a Hub and pull from it: the options travel with the checkpoint, and a re-save changes nothing."""

from __future__ import annotations

import json
import os
import subprocess
import sys

from tests.loopback_hub import Hub

PUSH = """
import torch
import hf_attn
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained({folder!r})
hf_attn.apply(model, "moba", block_size=16, top_k=3, layers={{"-1": None}})
model.push_to_hub("me/tiny-moba")
"""

PULL = """
import json, sys
import hf_attn
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/tiny-moba")
assert model.config._attn_implementation == "hf_attn_moba", model.config._attn_implementation
print(json.dumps(model.config.hf_attn, sort_keys=True))
model.push_to_hub("me/again")
"""

PULL_WITHOUT_PLUGIN = """
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("me/tiny-moba")
print(model.config._attn_implementation)
"""


def test_push_pull_and_push_again(tiny_model, tmp_path):
    with Hub() as hub:
        environment = {
            **os.environ,
            "HF_ENDPOINT": hub.url,
            "HF_TOKEN": "hf_dummy",
            "HF_HOME": str(tmp_path / "home"),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_OFFLINE": "0",
        }

        def python(code: str) -> str:
            done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment)
            assert done.returncode == 0, done.stderr
            return done.stdout.strip().splitlines()[-1] if done.stdout.strip() else ""

        python(PUSH.format(folder=tiny_model))
        stored = json.loads(hub.repos["me/tiny-moba"].files["config.json"])
        pulled = json.loads(python(PULL))
        assert pulled == stored["hf_attn"]
        assert pulled["mechanism"] == "moba" and pulled["top_k"] == 3 and pulled["layers"] == {"-1": None}
        first, again = (hub.repos[name].files for name in ("me/tiny-moba", "me/again"))
        assert json.loads(first["config.json"])["hf_attn"] == json.loads(again["config.json"])["hf_attn"]
        assert first["model.safetensors"] == again["model.safetensors"]
        assert python(PULL_WITHOUT_PLUGIN) == "sdpa"
