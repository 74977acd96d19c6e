"""Every speed bar of the project: what it asks for, the command that measures it, and what limits the missed ones."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Bar:
    """A speed that the project promises.

    Args:
        name: for `--only`; unique.
        what: what is measured against what.
        command: module of `hf_attn.bench` and its arguments; bars that share one are read from one run of it.
        case: the row of the module; where several begin with these words the worst counts.
        figure: one of the module's `FIGURES`.
        bound: what the figure must reach.
        most: the figure must stay below the bound instead.
        seconds: about what the command takes on two quiet cores.
        needs: "gpu" or "cxx" (a C++ compiler); the bar is skipped where that is missing.
    """

    name: str
    what: str
    command: str
    case: str
    figure: str
    bound: float
    most: bool = False
    seconds: float = 30
    needs: str = ""

    def margin(self, value: float) -> float:
        """How far the bar is passed, 1 exactly at it."""
        return self.bound / value if self.most else value / self.bound

    @property
    def line(self) -> str:
        return f"python -m hf_attn.bench.{self.command}"

    @property
    def threads(self) -> int:
        words = self.command.split()
        return int(words[words.index("--threads") + 1]) if "--threads" in words else 1


_ROWS = "1/8 of the blocks a row, per head"


@dataclass(frozen=True)
class Command:
    """A command of several bars."""

    line: str
    seconds: float
    needs: str = ""

    def bar(self, name: str, what: str, case: str, figure: str, bound: float, *, most: bool = False) -> Bar:
        return Bar(name, what, self.line, case, figure, bound, most, self.seconds, self.needs)


_SPARSE = Command(f'block_sparse_speed --dtype fp32 --repeats 7 --pattern "{_ROWS}"', 25)
_SPARSE_TRAINING = Command(f"{_SPARSE.line} --backward", 50)
_ROUTED = Command("routed_speed --repeats 7 --lengths 16384 32768", 70)
_LINEAR = Command("linear_speed", 25)
_LAYER = Command('decode_layer --lengths 32768 65536 --variants "per query head" group_max', 25)
_DECODE = Command("serving_speed decode --lengths 4096 8192 --threads 2", 170)
_PREFILL = Command("serving_speed prefill --lengths 8192 --threads 2", 300)
_PSA = Command("psa_speed --density 0.25 0.2 0.125 --dtype fp32 bf16", 45)
_VIDEO = Command(
    'video_speed --attention --heads 4 --head-dim 64 --mechanism vmoba "vmoba scope=head_global" --repeats 7', 60
)
_WAN = Command('video_speed --mechanism psa vmoba "vmoba scope=head_global" --repeats 7', 190)
_SMALL = Command(f"{_WAN.line} --model small", 45)
_DEFAULT = Command("video_speed --mechanism psa vmoba paroattention --default --repeats 7", 120)
_PARO = Command("paro_speed attention --repeats 7", 25)
_PARO_WAN = Command("paro_speed model --heads 4 --dim 128 --ffn 3072 --density 0.2 0.125 --repeats 7", 90)
_PARO_SMALL = Command("paro_speed model --heads 2 --dim 64 --ffn 512 --density 0.2 0.125 --repeats 7", 35)
_PARO_INT8 = Command("paro_speed quantized --density 0.25 --repeats 7", 20)
_MOH = Command("head_routed_speed --lengths 2048 4096 --top-k 4 3", 15)
_CORE = Command("blockrank_speed core --documents 20 50 100", 20)
_RANK = Command("blockrank_speed rank --repeats 7 --threads 2", 140)
_RANK_500 = Command("blockrank_speed scaling --repeats 7 --threads 2", 220)
_LANDMARK = Command("landmark_decode --lengths 16384 32768", 8)
_UOE = Command("selective_speed --lengths 4096", 15)
_MEMORY = Command("memory_speed --repeats 7", 25)
_SCAN = Command("selective_scan_speed --sizes 1 16 --repeats 7", 15)
_NEAR = Command("neighborhood_speed --repeats 7", 40)
_BILEVEL = Command("bilevel_speed", 10)
_SPANNED, _MIXING = (
    Command(f"vision_windows_speed {part}", seconds) for part, seconds in (("spanned", 10), ("mixing", 30))
)
_DINAT = Command("oneformer_speed --parts dinat --slow-repeats 7", 25)
_BACKBONES = Command("backbone_speed", 120)


def _flex() -> list[Bar]:
    bars = []
    for threads in (1, 2):
        command = Command(
            f"flex_speed --threads {threads} --dtype fp32 bf16 --length 4096 8192 --repeats 7", 110, needs="cxx"
        )
        for dtype, bound in (("fp32", 1.15), ("bf16", 1.5)):
            for length in (4096, 8192):
                for kind, words in (("lower", "causal"), ("full", "bidirectional")):
                    name = f"flex-{words}-{dtype}-{length}-{threads}t"
                    what = f"compiled flex_attention, 12.5 %, {words}, {dtype}, {length}, {threads} thread(s)"
                    case = f"{kind} {dtype} {length}"
                    bars.append(command.bar(name, what, case, "over flex", bound if threads == 1 else 1.0))
    return bars


def _videos() -> list[Bar]:
    """Wan calls at 8192 tokens: the speed-up, and its share of Amdahl's bound."""
    bars = []
    for model, command, bounds in (("wan", _WAN, (1.4, 1.6)), ("small", _SMALL, (1.9, 2.4))):
        for text in ("psa", "vmoba", "vmoba scope=head_global"):
            for density, bound in zip((0.2, 0.125), bounds, strict=True):
                name = f"{model}-{text.replace(' scope=', '-')}-{density}"
                what, case = f"a stock Wan call ({model}), {text}, density {density}", f"{text} {density}"
                bars.append(command.bar(name, what, case, "speed-up", bound))
                if model == "wan":
                    bars.append(command.bar(f"{name}-bound", f"{what}: of Amdahl's bound", case, "of bound", 0.75))
    for model, command, bounds in (("wan", _PARO_WAN, (1.4, 1.6)), ("small", _PARO_SMALL, (1.9, 2.4))):
        for density, bound in zip((0.2, 0.125), bounds, strict=True):
            name, case = f"{model}-paroattention-{density}", f"model {density}"
            what = f"a stock Wan call ({model}), paroattention, density {density}"
            bars.append(command.bar(name, what, case, "speed-up", bound))
            if model == "wan":
                bars.append(command.bar(f"{name}-bound", f"{what}: of Amdahl's bound", case, "of bound", 0.75))
    for name in ("psa", "vmoba", "paroattention"):
        what = f"time over a stock Wan call, {name} without options, 8192"
        bars.append(_DEFAULT.bar(f"wan-{name}-default", what, f"{name} default", "time", 1.02, most=True))
    return bars


def _gpu() -> list[Bar]:
    def command(family: str, seconds: float) -> Command:
        return Command(f"gpu_bars --only {family}", seconds, needs="gpu")

    sparse, moba, linear = command("block_sparse", 60), command("moba", 120), command("linear", 60)
    near, best = command("neighborhood", 120), "the best dense attention, GPU"
    bars = [
        sparse.bar("gpu-block-sparse-8k", f"share of the limit, {best}", "block-sparse 8k forward", "limit", 0.6),
        sparse.bar("gpu-block-sparse-64k", f"share of the limit, {best}", "block-sparse 64k forward", "limit", 0.75),
        moba.bar("gpu-moba-8k", best, "MoBA 8k forward", "speed-up", 1),
        moba.bar("gpu-moba-256k", best, "MoBA 256k forward", "speed-up", 10),
        moba.bar("gpu-moba-64k-training", best, "MoBA 64k forward+backward", "speed-up", 2),
        moba.bar("gpu-moba-256k-training", best, "MoBA 256k forward+backward", "speed-up", 5),
        linear.bar("gpu-linear-fla-8k", "flash-linear-attention", "linear 8k forward", "over fla", 1),
        linear.bar("gpu-linear-fla-32k", "flash-linear-attention", "linear 32k forward", "over fla", 1),
    ]
    for length in (8, 64):
        case = f"block-sparse {length}k forward+backward"
        bars.append(
            sparse.bar(f"gpu-block-sparse-{length}k-training", f"share of the limit, {best}", case, "limit", 0.6)
        )
    for length in (8, 64, 256):
        name, what = f"gpu-moba-{length}k-selection", "selection over the whole"
        bars.append(moba.bar(name, what, f"MoBA {length}k forward", "selection", 0.15, most=True))
    for length in (4, 8, 32):
        for kind, words in (("forward", ""), ("forward+backward", "-training")):
            bars.append(linear.bar(f"gpu-linear-{length}k{words}", best, f"linear {length}k {kind}", "speed-up", 1))
    for name, limit in (("2-D 64x64 K7", 0.5), ("2-D 64x64 K13", 0.5), ("2-D 256x256 K80", 0.5),
                        ("2-D 256x256 K80 stride 16", 0.8), ("3-D 32x48x80 K18x24x24", 0.5),
                        ("3-D 32x48x80 K16x24x16 stride 16x8x8", 0.8)):  # fmt: skip
        short = "gpu-neighborhood-" + name.lower().replace(" ", "-")
        bars.append(near.bar(short, f"share of the limit, {best}", f"neighborhood {name} forward", "limit", limit))
    for kernel in (7, 13):
        for kind, words, bound in (("forward", "", 3), ("forward+backward", "-training", 2)):
            case = f"neighborhood 2-D 64x64 K{kernel} {kind}, masked"
            name = f"gpu-neighborhood-masked-k{kernel}{words}"
            bars.append(near.bar(name, "masked dense attention, GPU", case, "speed-up", bound))
    return bars


_IMAGE, _FRAMES = "56x56 K=7x7", "16x32x32 K=5x7x7"
BARS = (
    _SPARSE.bar("block-sparse", "share of the limit, 8 blocks a row of 64, fp32", f"fp32 {_ROWS}", "limit", 0.6),
    _SPARSE_TRAINING.bar("block-sparse-training", "the same, forward and backward", f"fp32 {_ROWS}", "limit", 0.6),
    _ROUTED.bar("moba-16k", "dense, routing included, 16384", "16384", "speed-up", 1.8),
    _ROUTED.bar("moba-32k", "dense, routing included, 32768", "32768", "speed-up", 3),
    *(_LINEAR.bar(f"linear-{h}{tail}", f"dense, 4096, {h} head(s), {kind}", f"{h} heads", kind, 6)
      for h in (1, 4) for tail, kind in (("", "forward"), ("-training", "forward and backward"))),
    *(_LINEAR.bar(f"linear-{h}-growth", "time(32k) / time(2k)", f"{h} heads", "growth", 20, most=True) for h in (1, 4)),
    _LINEAR.bar("linear-4-growth-16k", "time(16k) / time(4k)", "4 heads", "growth to 16k", 5.5, most=True),
    _LINEAR.bar("linear-4-masked", "the masked form with its decays at hand, 4096", "4 heads", "over masked form", 20),
    _LAYER.bar("lserve-32k", "the whole cache, a list a query head, 32768", "32768 per query head", "speed-up", 2.5),
    _LAYER.bar("lserve-64k", "the same, 65536", "65536 per query head", "speed-up", 6),
    _LAYER.bar("lserve-group-32k", "the same, a list a group, 32768", "32768 group_max", "speed-up", 6),
    _LAYER.bar("lserve-selector", "selector's share, reuse 4", "32768 per query head", "selector", 0.25, most=True),
    *(_DECODE.bar(f"lserve-decode-{n}{tail}", f"SmolLM2, {n} tokens, 2 threads, {kind}", f"decode {n}", kind, bound)
      for n, bounds in ((4096, (1.25, 1.1)), (8192, (1.7, 1.4)))
      for tail, kind, bound in zip(("", "-own"), ("over DynamicCache", "over own dense"), bounds, strict=True)),
    _PREFILL.bar("lserve-prefill", "SmolLM2, a prefill of 8192, end to end", "prefill 8192", "end to end", 1.2),
    _PREFILL.bar("lserve-prefill-attention", "its attention calls", "prefill 8192", "attention", 1.6),
    *(_PSA.bar(f"psa-{dtype}-{density}", f"dense, {dtype}, density {density}", f"{dtype} {density}", "speed-up", b)
      for dtype, bounds in (("fp32", (2.2, 2.8, 3.8)), ("bf16", (1.9, 2.4, 3.3)))
      for density, b in zip((0.25, 0.2, 0.125), bounds, strict=True)),
    *(_VIDEO.bar(f"{name}-{density}", f"dense, slowest partition, {density}", f"{text} {density}", "speed-up", b)
      for name, text in (("vmoba", "vmoba"), ("vmoba-head_global", "vmoba scope=head_global"))
      for density, b in ((0.2, 2.2), (0.125, 3))),
    *_videos(),
    *(_PARO.bar(f"paro-{density}", f"dense, reordering included, {density}", f"attention {density}", "speed-up", b)
      for density, b in ((0.5, 1.5), (0.25, 2.5))),
    _PARO.bar("paro-reorder", "reordering over dense time", "attention 0.25", "reorder", 0.05, most=True),
    _PARO_INT8.bar("paro-int8-fp32", "our sparse fp32 path, same mask", "quantized 0.25", "over fp32", 1.2),
    _PARO_INT8.bar("paro-int8-bf16", "our sparse bf16 path, same mask", "quantized 0.25", "over bf16", 1.1),
    _MOH.bar("moh-6", "dense, 6 of 9 heads, 4096", "4096 6/9", "speed-up", 1.25),
    _MOH.bar("moh-7", "dense, 7 of 9 heads, 4096", "4096 7/9", "speed-up", 1.12),
    _MOH.bar("moh-6-2048", "dense, 6 of 9 heads, 2048", "2048 6/9", "speed-up", 1.25),
    *(_CORE.bar(f"blockrank-{n}", f"dense, {n} documents", str(n), "speed-up", b)
      for n, b in ((20, 2.5), (50, 4.5), (100, 7))),
    _RANK.bar("blockrank-rank", "a dense forward, 100 documents, 2 threads", "100", "speed-up", 2),
    _RANK_500.bar("blockrank-500", "500 documents over 100, 2 threads", "500 over 100", "growth", 5.5, most=True),
    _LANDMARK.bar("landmark-16k", "dense over the whole cache, 16384", "16384", "speed-up", 4),
    _LANDMARK.bar("landmark-32k", "the same, 32768", "32768", "speed-up", 8),
    _UOE.bar("uoe-2", "dense, 2 of 3 experts, 4096", "4096 2 of 3", "speed-up", 1.6),
    _UOE.bar("uoe-1", "dense, 1 of 3 experts, 4096", "4096 1 of 3", "speed-up", 4),
    _MEMORY.bar("titans", "token by token, 1024", "chunks", "speed-up", 3),
    _MEMORY.bar("titans-growth", "time at 4096 over 1024", "chunks", "growth", 4.8, most=True),
    _SCAN.bar("lamamba-scan-1", "transformers' scan, n = 1", "n = 1", "speed-up", 3),
    _SCAN.bar("lamamba-scan-16", "transformers' scan, n = 16", "n = 16", "speed-up", 1),
    _NEAR.bar("neighborhood-image", "masked dense, 56x56, windows of 7", f"{_IMAGE} fwd", "over masked", 8),
    _NEAR.bar("neighborhood-image-training", "the same with backward", f"{_IMAGE} fwd+bwd", "over masked", 8),
    _NEAR.bar("neighborhood-video", "masked dense, 16x32x32, windows of 5x7x7", f"{_FRAMES} fwd", "over masked", 10),
    _NEAR.bar("neighborhood-video-training", "the same with backward", f"{_FRAMES} fwd+bwd", "over masked", 10),
    _NEAR.bar("neighborhood-image-plain", "dense without a mask, 56x56", f"{_IMAGE} fwd", "over plain", 5),
    _NEAR.bar("neighborhood-video-plain", "dense without a mask, 16x32x32", f"{_FRAMES} fwd", "over plain", 5),
    _BILEVEL.bar("biformer", "dense, 56x56, 4 of 49 regions, copied as by default", "forward", "copy", 3),
    _SPANNED.bar("emov2-window", "dense, 32x32, dim 160", "spanned 32x32", "forward", 2),
    _MIXING.bar("overlock-mixing", "unfolded windows, 28x28, K 13", "mixing 28x28 K 13 4 x 16", "forward", 2),
    _DINAT.bar("dinat", "masked dense, a backbone at 512 pixels", "dinat", "speed-up", 3),
    *(_BACKBONES.bar(f"backbone-{variant.replace(' ', '-')}", f"time over the official order, {variant}, 224 pixels",
                     variant, "ours", 1.1, most=True)
      for variant in ("biformer tiny", "emov2 1m", "emov2 5m", "overlock xt", "patnet t0", "patnet t2")),
    *_flex(),
    *_gpu(),
)  # fmt: skip

# Beginning of a bar's name -> what limits it and what was tried; the first that fits is shown where a bar is missed.
WHY: dict[str, str] = json.loads((Path(__file__).parent / "results" / "bar_notes.json").read_text())
