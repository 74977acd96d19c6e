"""Push, delete the local copy, load in a fresh process: every kind of checkpoint, with and without the package."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hf_attn.integrations.hub.cards import check_card
from tests.loopback_hub import run_python

pytest.importorskip("peft")

ROOT = Path(__file__).resolve().parents[3]

COMMON = """
import hashlib, json, torch
IDS = torch.arange(3, 40)[None]
def digest(model):
    with torch.no_grad():
        return hashlib.sha256(model.eval()(IDS).logits.contiguous().numpy().tobytes()).hexdigest()
"""

PUSH = """
import peft, hf_attn
from tests.models.families import MOBA, host
folder = {folder!r}
plain = host("llama")
plain.save_pretrained(folder + "/plain")
plain.push_to_hub("me/plain", max_shard_size="20kB")
base = hf_attn.convert(plain, "moba", **MOBA)
hf_attn.set_card(base, data="random bytes", license="apache-2.0", base_model="me/plain",
                 metrics={{"held-out loss": {{"dense": 2.5, "before": 3.25, "after": 2.625}}}})
with torch.no_grad():
    for name, weight in base.named_parameters():
        if "k_conv1d" in name:
            weight.normal_(0, 0.5)
base.push_to_hub("me/converted", max_shard_size="20kB")
base.save_pretrained(folder + "/converted", max_shard_size="20kB")
found = {{"plain": digest(plain), "converted": digest(base)}}
lora = peft.LoraConfig(target_modules=["q_proj", "v_proj"], modules_to_save=["k_conv1d"], init_lora_weights=False)
model = peft.get_peft_model(base, lora)
found["adapter"] = digest(model)
hf_attn.save_adapter(model, folder + "/adapter")
model.push_to_hub("me/adapter")
hf_attn.push(folder + "/adapter", "me/adapter-by-folder", trained="LoRA on q and v, and the convolutions")
merged = model.merge_and_unload()
found["merged"] = digest(merged)
merged.push_to_hub("me/merged")
print(json.dumps(found))
"""

WITH_PACKAGE = """
import hf_attn, peft
from transformers import AutoModelForCausalLM
load = AutoModelForCausalLM.from_pretrained
found = {name: digest(load(f"me/{name}")) for name in ("plain", "converted", "merged")}
found["adapter"] = digest(hf_attn.load_adapter("me/plain", "me/adapter"))
found["adapter, by folder"] = digest(hf_attn.load_adapter("me/converted", "me/adapter-by-folder"))
found["adapter, base in memory"] = digest(hf_attn.load_adapter(load("me/plain"), "me/adapter"))
found["adapter, by PEFT"] = digest(peft.PeftModel.from_pretrained(load("me/converted"), "me/adapter"))
print(json.dumps(found))
"""

TRUSTED = """
import sys, peft
from transformers import AutoModelForCausalLM
load = lambda name: AutoModelForCausalLM.from_pretrained(name, trust_remote_code=True)
assert "hf_attn" not in sys.modules
converted = load("me/converted")
assert "hf_attn" in sys.modules
found = {"converted": digest(converted), "merged": digest(load("me/merged"))}
found["adapter, by PEFT"] = digest(peft.PeftModel.from_pretrained(load("me/converted"), "me/adapter"))
converted.push_to_hub("me/again")
print(json.dumps(found))
"""

NEITHER = """
import sys
from transformers import AutoModelForCausalLM
for name in ("me/converted", "me/merged"):
    try:
        AutoModelForCausalLM.from_pretrained(name, trust_remote_code=False)
    except ValueError as error:
        assert "trust_remote_code=True" in str(error), error
    else:
        raise SystemExit(f"{name} loaded without its code")
assert "hf_attn" not in sys.modules
print(json.dumps({"plain": digest(AutoModelForCausalLM.from_pretrained("me/plain"))}))
"""


@pytest.fixture(scope="module")
def pushed(loopback, tmp_path_factory):
    """The Hub with a base, its conversion in shards, an adapter and the merged model; nothing is left on disk."""
    hub, environment = loopback
    folder = tmp_path_factory.mktemp("local")
    want = json.loads(run_python(COMMON + PUSH.format(folder=str(folder)), environment).splitlines()[-1])
    shutil.rmtree(folder)
    shutil.rmtree(environment["HF_HOME"])
    return hub, environment, want


@pytest.mark.parametrize("code", [WITH_PACKAGE, TRUSTED, NEITHER], ids=["with package", "trusted", "neither"])
def test_loads_with_identical_logits(pushed, code):
    _, environment, want = pushed
    found = json.loads(run_python(COMMON + code, environment).splitlines()[-1])
    assert len(set(want.values())) == 4
    for name, digest in found.items():
        assert digest == want[name.partition(",")[0]], name


def test_files_and_cards(pushed, tmp_path):
    hub, _, _ = pushed
    files = hub.repos["me/converted"].files
    assert len([name for name in files if name.endswith(".safetensors")]) >= 3 and "modeling_hf_attn.py" in files
    auto_map = json.loads(files["config.json"])["auto_map"]
    assert auto_map["AutoModelForCausalLM"] == "modeling_hf_attn.MobaLlamaForCausalLM"
    for repo in ("me/adapter", "me/adapter-by-folder"):
        assert "hf_attn.json" in hub.repos[repo].files and "config.json" not in hub.repos[repo].files
    for repo in ("me/converted", "me/merged", "me/adapter", "me/adapter-by-folder"):
        card = tmp_path / "README.md"
        card.write_bytes(hub.repos[repo].files["README.md"])
        check_card(card)
        text = card.read_text()
        assert "| held-out loss | 2.5 | 3.25 | 2.625 |" in text and "base_model: me/plain" in text
        assert "random bytes" in text and "license: apache-2.0" in text and 'hf_attn.convert(model, "moba"' in text
        assert f'"{repo}"' in text
    assert "LoRA on q and v" in hub.repos["me/adapter-by-folder"].files["README.md"].decode()


def test_saved_again_through_the_thin_file(pushed):
    """Still the thin file, and nothing of this package."""
    hub, environment, _ = pushed
    if "me/again" not in hub.repos:
        run_python(COMMON + TRUSTED, environment)
    first, again = hub.repos["me/converted"].files, hub.repos["me/again"].files
    assert again["modeling_hf_attn.py"] == first["modeling_hf_attn.py"]
    assert json.loads(again["config.json"])["auto_map"] == json.loads(first["config.json"])["auto_map"]
    assert [name for name in again if name.endswith(".py")] == ["modeling_hf_attn.py"]


def test_example(loopback, tiny_model):
    """examples/convert_and_push.py, as a user runs it."""
    hub, environment = loopback
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "convert_and_push.py"), "--model", tiny_model, "--user", "me"],
        capture_output=True,
        text=True,
        env={**environment, "PYTHONPATH": str(ROOT), "HF_ATTN_BACKEND": "torch"},
    )
    assert done.returncode == 0, done.stderr
    dense, before, after = map(float, re.findall(r"(?:dense|converted|tuned) ([0-9.]+)", done.stdout))
    assert after < dense and after < before
    model, adapter = map(float, re.findall(r"(?:model|base) ([0-9.e+-]+)", done.stdout))
    assert model == 0 and adapter < 1e-4
    assert "hf_attn.json" in hub.repos["me/moba-adapter"].files
    assert "LoRA on q_proj" in hub.repos["me/moba-converted"].files["README.md"].decode()


SYSTEMS = """
import hf_attn
from tests.models.families import host
from tests.models.test_moh_vit import PIXELS, convert, vit
heads = {"hidden_size": 48, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8}
for name, options in (
    ("moh", {"shared_heads": [0, 1], "top_k": 2, "tokens": IDS, "router": "learned"}),
    ("uoe", {"attn_top_k": 1}),
    ("landmark", {"block_size": 4, "top_k": 2, "train_length": 64}),
):
    model = hf_attn.convert(host("llama", **heads), name, **options)
    hf_attn.set_card(model, data="random bytes", license="apache-2.0", lengths="any")
    model.push_to_hub(f"me/{name}")
model = convert(vit())
hf_attn.set_card(model, data="random images", license="apache-2.0", lengths="20 x 20 pixels")
model.push_to_hub("me/moh-vit")
"""


def test_every_family_pushes_its_card(loopback, tmp_path):
    hub, environment = loopback
    run_python(COMMON + SYSTEMS, environment)
    for name in ("moh", "uoe", "landmark", "moh-vit"):
        files = hub.repos[f"me/{name}"].files
        card = tmp_path / "README.md"
        card.write_bytes(files["README.md"])
        check_card(card)
        assert f'from_pretrained("me/{name}")' in card.read_text() and "modeling_hf_attn.py" in files
