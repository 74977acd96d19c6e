"""Mechanism and MechanismConfig bases, and the registry of mechanisms (one file of hf_attn/mechanisms each)."""

from __future__ import annotations

import importlib
import math
import pkgutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar, Self

from torch import Tensor

from hf_attn.call import AttentionCall
from hf_attn.checks import did_you_mean, require_int, require_share

LayerOptions = dict[str, Any] | None
_FOLDER = Path(__file__).with_name("mechanisms")


@dataclass
class MechanismConfig:
    """Options every mechanism has. Subclasses add their own fields and check them in `__post_init__`.

    Args:
        layers: options of single layers, `{index or slice: options or None}`. Keys are ints, or strings as in Python
            (`"3"`, `"-3:"`, `"::2"`); `None` leaves these layers dense; later entries win over earlier ones.
    """

    layers: dict[str, LayerOptions] = field(default_factory=dict, kw_only=True)

    aliases: ClassVar[dict[str, str]] = {}

    def __post_init__(self) -> None:
        if not isinstance(self.layers, dict):
            raise TypeError(f"layers must be a dict {{index or slice: options or None}}, got {self.layers!r}")
        self.layers = {str(key): value for key, value in self.layers.items()}
        for key, options in self.layers.items():
            _parse_layer_key(key)
            if options is not None and not isinstance(options, dict):
                raise TypeError(f"layers[{key!r}] must be a dict of options or None (dense), got {options!r}")
            if options and "layers" in options:
                raise ValueError(f"layers[{key!r}] must not hold 'layers' itself; name the layers at the top level")
            if options is not None:
                # A bad value must raise now, not when that layer is first called.
                type(self).from_dict({**self._own_options(), **options})

    def _own_options(self) -> dict[str, Any]:
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "layers"}

    @classmethod
    def from_dict(cls, options: dict[str, Any]) -> Self:
        """Build and check; an unknown option raises ValueError with the valid ones."""
        options = {cls.aliases.get(name, name): value for name, value in options.items()}
        valid = [f.name for f in fields(cls)]
        for name in options:
            if name not in valid:
                raise ValueError(
                    f"{cls.__name__} has no option {name!r}{did_you_mean(name, valid)}. Options: {', '.join(valid)}."
                )
        return cls(**options)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready options; `from_dict` restores an equal object."""
        return asdict(self)

    def for_layer(self, index: int | None, count: int | None) -> Self | None:
        """The options of one layer, `None` when it is to stay dense.

        Raises ValueError when `layers` names layers but the host does not tell this layer's number.
        """
        if not self.layers:
            return self
        if index is None:
            raise ValueError("layers= needs numbered layers, but this attention module has no layer_idx; drop layers=")
        merged: dict[str, Any] = {}
        dense = False
        for key, options in self.layers.items():
            if not _layer_matches(key, index, count):
                continue
            dense = options is None
            if options is not None:
                merged.update(options)
        if dense:
            return None
        return type(self).from_dict({**self._own_options(), **merged})

    def check_layer_count(self, count: int) -> None:
        """Refuse single indices that no layer has; a slice may be empty."""
        for key in self.layers:
            where = _parse_layer_key(key)
            if isinstance(where, int) and not -count <= where < count:
                raise ValueError(f"layers names layer {key}, but the model has {count} layers (0 to {count - 1})")

    def check_head_count(self, count: int) -> None:
        """Refuse options that were made for another number of KV heads; most mechanisms have none."""


@dataclass
class DiffusionConfig(MechanismConfig):
    """Options every mechanism for diffusion models has, with one meaning everywhere.

    Args:
        density: share of the visible (query, key) pairs to compute, in (0, 1]; what came of it is in `hf_attn.stats`.
            `None` leaves it to the mechanism's own options.
        dense_steps: first denoising steps that stay dense: an int counts steps, a float in [0, 1] is a share of them.
        min_tokens: sequences shorter than this stay dense, >= 0.
        schedule: densities over the run, stretched over its steps: of n values, step s of m takes number
            floor(s * n / m); 1.0 is dense. Wins over `density`.
        strict: raise, instead of running dense with one warning, when a call does not fit (its length is not that of
            the latent grid, a mask that is more than padding).
    """

    density: float | None = field(default=None, kw_only=True)
    dense_steps: int | float = field(default=0.25, kw_only=True)
    min_tokens: int = field(default=4096, kw_only=True)
    schedule: list[float] | None = field(default=None, kw_only=True)
    strict: bool = field(default=False, kw_only=True)

    def __post_init__(self) -> None:
        if self.density is not None:
            require_share("density", self.density)
        if isinstance(self.dense_steps, float):
            if not 0 <= self.dense_steps <= 1:
                raise ValueError(f"dense_steps as a share of the steps must lie in 0 to 1, got {self.dense_steps}")
        else:
            require_int("dense_steps", self.dense_steps, 0)
        require_int("min_tokens", self.min_tokens, 0)
        if self.schedule is not None:
            if not isinstance(self.schedule, list | tuple) or not self.schedule:
                raise ValueError(f"schedule must be a list of densities, got {self.schedule!r}")
            self.schedule = list(self.schedule)
            for number, value in enumerate(self.schedule):
                require_share(f"schedule[{number}]", value)
        if not isinstance(self.strict, bool):
            raise ValueError(f"strict must be True or False, got {self.strict!r}")
        super().__post_init__()

    @classmethod
    def preset_for(cls, model_id: str) -> str | None:
        """Name of the published setting (`preset=`) of a model on the Hub, None when there is none."""
        return None

    @property
    def fitted_density(self) -> float | None:
        """The density that these options aim at, None when it follows the input."""
        return self.density

    @property
    def needs_steps(self) -> bool:
        """Whether these options mean anything only when the step is known."""
        return self.dense_steps > 0 or self.schedule is not None

    def density_at(self, step: int | None, num_steps: int | None) -> float | None:
        """The density wanted at a step: the schedule's, where it can be read, else `density`."""
        if self.schedule is None or step is None:
            return self.density
        count = len(self.schedule)
        where = step if num_steps is None else step * count // num_steps
        return self.schedule[min(where, count - 1)]

    def dense_reason(self, tokens: int, step: int | None, num_steps: int | None) -> str | None:
        """Why a call of `tokens` tokens at this step stays dense, or None.

        A share of the steps counts as none where the number of steps is unknown.
        """
        if tokens < self.min_tokens:
            return f"fewer than min_tokens={self.min_tokens} tokens"
        if step is None:
            return None
        first = self.dense_steps
        if isinstance(first, float):
            # The share that the user wrote, not its binary neighbour: 0.07 of 100 steps are 7.
            first = math.ceil(round(first * num_steps, 6)) if num_steps is not None else 0
        if step < first:
            return f"dense_steps={self.dense_steps}"
        if self.schedule is not None and self.density_at(step, num_steps) == 1.0:
            return "schedule: density 1.0 at this step"
        return None


def _parse_layer_key(key: str) -> int | slice:
    parts = key.split(":")
    try:
        numbers = [int(part) if part.strip() else None for part in parts]
    except ValueError:
        numbers = []
    if len(numbers) == 1 and numbers[0] is not None:
        return numbers[0]
    if len(numbers) in (2, 3) and (len(numbers) < 3 or numbers[2] != 0):
        return slice(*numbers)
    raise ValueError(f"layers key {key!r} is neither a layer index nor a slice; examples: 0, '-1', '-3:', '::2'")


def _layer_matches(key: str, index: int, count: int | None) -> bool:
    where = _parse_layer_key(key)
    if isinstance(where, int):
        if where >= 0:
            return where == index
        where = slice(where, where + 1 or None)
    if count is None:
        raise ValueError(f"layers key {key!r} needs the number of layers, which this model does not tell; use indices")
    return index in range(count)[where]


@dataclass(frozen=True)
class Capabilities:
    """What a mechanism supports, as `list_mechanisms` prints it.

    `bidirectional`: layers that are not causal (encoders, vision towers); without it they are refused.
    `documents`: prompts of documents that do not see each other (`TokenLayout.documents`).
    `latent_grid`: needs the token grid of a diffusion transformer; transformers models have none and are refused.
    """

    train: bool = True
    decode: bool = True
    padding: bool = True
    packing: bool = True
    bidirectional: bool = True
    cpu: bool = True
    triton: bool = False
    diffusers: bool = False
    extra_weights: bool = False
    documents: bool = False
    latent_grid: bool = False


@dataclass(frozen=True)
class Mechanism:
    """One published attention system.

    Args:
        name: short name; the host string is `hf_attn_<name>`.
        summary: one line for `hf-attn list`.
        source: paper.
        config: its options.
        attend: `(call, config) -> [B, Hq, Nq, Dv]`.
        capabilities: flags.
        describe: `(config, q_len, k_len) -> dict` of facts `doctor` prints before anything runs (which path, density).
        select: `(call, config) -> BlockPattern`, the union over the queries of a block, for pictures.
        attended: `(call, config, rows) -> bool [B, Hq, R, Nk]`, keys that query rows `rows` (int64 [R]) really read,
            for analysis.
        store: `(config of a layer, layer number, KV heads) -> hf_attn.caches.store.LayerStore`, the mechanism's own
            cache of a layer; integrations hand it back in `call.layer.cache`. None: the host's cache is all it needs.
        step: `(query, key, value, scale, store, config, record) -> Tensor | None`, `attend` of one new token a row:
            all tokens are real and `store` is the mechanism's own. No call is described for it, which would cost as
            much as a short attention. None, with nothing changed, asks for `attend`.
    """

    name: str
    summary: str
    source: str
    config: type[MechanismConfig]
    attend: Callable[[AttentionCall, Any], Tensor]
    capabilities: Capabilities = field(default_factory=Capabilities)
    describe: Callable[[Any, int, int], dict[str, Any]] | None = None
    select: Callable[[AttentionCall, Any], Any] | None = None
    attended: Callable[[AttentionCall, Any, Tensor], Tensor] | None = None
    store: Callable[[Any, int | None, int | None], Any] | None = None
    step: Callable[..., Tensor | None] | None = None

    def __call__(self, call: AttentionCall, config: MechanismConfig) -> Tensor:
        """Attend, after every observer of `observe` has seen the call."""
        for observer in _observers:
            observer(self, call, config)
        return self.attend(call, config)


def observed() -> bool:
    """Whether anybody observes calls."""
    return bool(_observers)


_observers: list[Callable[[Mechanism, AttentionCall, MechanismConfig], None]] = []


@contextmanager
def observe(observer: Callable[[Mechanism, AttentionCall, MechanismConfig], None]) -> Iterator[None]:
    """Let `observer(mechanism, call, config)` see every call that reaches a mechanism inside the `with` block."""
    _observers.append(observer)
    try:
        yield
    finally:
        _observers.remove(observer)


_registered: dict[str, Mechanism] = {}


def register_mechanism(mechanism: Mechanism) -> Mechanism:
    """Add a mechanism of a third party; it is then found by its name like the files of hf_attn/mechanisms.

    Raises ValueError when the name is taken. `hf_attn.register_mechanism` also registers it with the host libraries.
    """
    if not isinstance(mechanism, Mechanism):
        raise TypeError(f"register_mechanism takes a hf_attn.Mechanism, got {type(mechanism).__name__}")
    if mechanism.name in mechanism_names() and _registered.get(mechanism.name) is not mechanism:
        raise ValueError(f"a mechanism called {mechanism.name!r} exists already; choose another name")
    _registered[mechanism.name] = mechanism
    return mechanism


def unregister_mechanism(name: str) -> None:
    """Take back `register_mechanism`; raises ValueError for names it did not add."""
    if name not in _registered:
        raise ValueError(f"{name!r} was not added by register_mechanism; added: {', '.join(_registered) or 'none'}")
    del _registered[name]


def mechanism_names() -> list[str]:
    """Names of all mechanisms: the files of hf_attn/mechanisms, found without importing them, and registered ones."""
    files = {m.name for m in pkgutil.iter_modules([str(_FOLDER)]) if not m.name.startswith("_")}
    return sorted(files | _registered.keys())


def get_mechanism(name: str) -> Mechanism:
    """The mechanism called `name`; raises ValueError with the nearest names."""
    if name in _registered:
        return _registered[name]
    names = mechanism_names()
    if name not in names:
        raise ValueError(f"unknown mechanism {name!r}{did_you_mean(name, names)}. Mechanisms: {', '.join(names)}.")
    return importlib.import_module(f"hf_attn.mechanisms.{name}").MECHANISM


def parse_config(options: dict[str, Any]) -> tuple[Mechanism, MechanismConfig]:
    """Mechanism and checked config of a flat dict with a "mechanism" key, as `config.hf_attn` holds it."""
    options = dict(options)
    mechanism = get_mechanism(options.pop("mechanism"))
    return mechanism, mechanism.config.from_dict(options)
