"""The definition of a study: the options of `placesearch run` as one checked value."""

import re
import reprlib
from pathlib import Path
from typing import Annotated, Any, Literal

import yaml
from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationError,
    ValidationInfo,
    field_validator,
)

from placesearch.errors import InputError, did_you_mean, printable
from placesearch.records import DIRECTIONS
from placesearch.storage_url import StorageUrl

KINDS = ("residual", "block", "stage", "last", "head")
"""Every kind of site; `placesearch.models.sites.find_sites` says what they are."""

MOST_JOBS = 8
"""So many trials run at a time, at most, unless a study allows more from its beginning."""

LARGEST_FILE = 4_000_000
"""Characters that a YAML file may have."""

_UNITS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def _words(value: Any) -> Any:
    """Split `se,cbam` as the command line gives it; leave lists as they are."""
    return tuple(part.strip() for part in value.split(",")) if isinstance(value, str) else value


def _numbers(value: Any) -> Any:
    """Split `4,8,16` as the command line gives it; one number stands for a list of one."""
    if isinstance(value, int):
        return (value,)
    if isinstance(value, str):
        try:
            return tuple(int(part) for part in value.split(","))
        except ValueError:
            raise ValueError(f"'{value}' is no list of whole numbers such as 4,8,16") from None
    return value


def _seconds(value: Any) -> Any:
    """Read `90`, `90s`, `10m`, `2h` or `1d` as seconds."""
    if isinstance(value, str):
        match = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([smhd]?)", value.strip())
        if match is None:
            raise ValueError(f"'{value}' is no duration such as 90s, 10m or 2h")
        return float(match[1]) * _UNITS[match[2] or "s"]
    return value


def seconds_of(text: str) -> float:
    """Return a duration such as `90s`, `10m` or `2h` in seconds.

    Raises:
        InputError: If it is none.

    Example:
        >>> seconds_of("10m")
        600.0
    """
    try:
        return float(_seconds(text))
    except ValueError as error:
        raise InputError(str(error)) from None


_LIMIT = re.compile(
    r"(?:\+(?P<percent>[0-9]+(?:\.[0-9]+)?)%|(?P<number>[0-9]+(?:\.[0-9]+)?(?:e\+?[0-9]{1,2})?)(?P<unit>[kMGT]?))"
)
_MANY = {"": 1, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def _limit(value: Any) -> Any:
    """Check `+5%`, `12M`, `1.8G` or `11200000`."""
    text = str(value) if isinstance(value, int | float) else value
    if isinstance(text, str) and not _LIMIT.fullmatch(text):
        raise ValueError(f"'{text}' is no limit such as +5% (more than the plain backbone), 12M or 1800000000")
    return text


def limit_of(text: str, plain: float) -> float:
    """Return what a limit comes to.

    Args:
        text: `+5%` for more than the plain backbone, or a number with k, M, G or T after it.
        plain: What the plain backbone costs.

    Example:
        >>> limit_of("+5%", 200), limit_of("12M", 200), limit_of("1.5k", 200)
        (210.0, 12000000.0, 1500.0)
    """
    match = _LIMIT.fullmatch(text)
    if match is None:
        raise ValueError(text)
    if match["percent"]:
        return plain + plain * float(match["percent"]) / 100
    return float(match["number"]) * _MANY[match["unit"]]


def shown(value: Any) -> str:
    """Return a value from a file as text for a message: short, however deep or long it is.

    Example:
        >>> shown(["se"] * 1000), shown(16**10_000)
        ("['se', 'se', 'se', ...]", 'a number of more than 4,300 digits')
    """
    try:
        return _SHORT.repr(value)
    except ValueError:  # Python does not write such numbers out
        return "a number of more than 4,300 digits"


def _short() -> reprlib.Repr:
    short = reprlib.Repr()
    short.maxlevel, short.maxlist, short.maxtuple, short.maxdict = 3, 3, 3, 5
    short.maxstring = short.maxlong = short.maxother = 100
    return short


_SHORT = _short()


def first_problem(error: ValidationError) -> str:
    """Return the first problem that pydantic found, as `field: what is wrong`.

    Args:
        error: What pydantic raised.
    """
    problem = error.errors()[0]
    message = problem["msg"].removeprefix("Value error, ")
    place = ".".join(str(part) for part in problem["loc"]) or "file"
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{place}'"
    given = f", got {shown(problem['input'])}" if problem["type"] not in ("missing", "value_error") else ""
    return f"{place.replace('_', '-')}: {message}{given}"


SMALLEST_SIDE, LARGEST_SIDE = 8, 8192
"""Height and width that an input may have, in pixels."""


def read_input_size(value: Any) -> int | tuple[int, ...]:
    """Read an input size: a number for a square, height x width, or channels x height x width.

    Args:
        value: A number, a text such as `64`, `256x512` or `1x28x28`, or a list of numbers.

    Raises:
        ValueError: If it is none of these, or out of bounds.

    Example:
        >>> read_input_size("64"), read_input_size("256x512"), read_input_size([1, 28, 28])
        (64, (256, 512), (1, 28, 28))
    """
    parts = (
        value.lower().split("x") if isinstance(value, str) else value if isinstance(value, list | tuple) else [value]
    )
    try:
        numbers = tuple(int(part) for part in parts if not isinstance(part, bool | float))
    except (TypeError, ValueError):
        numbers = ()
    if not 1 <= len(numbers) <= 3 or len(numbers) != len(parts):
        raise ValueError(f"{shown(value)} is no input size such as 64, 256x512 or 1x28x28 (channels, height, width)")
    if len(numbers) == 3 and not 1 <= numbers[0] <= 1024:
        raise ValueError(f"{numbers[0]} is no number of channels; expected 1 to 1,024")
    for side in numbers[-2:]:
        if not SMALLEST_SIDE <= side <= LARGEST_SIDE:
            raise ValueError(
                f"{side} is not allowed as height or width; allowed are {SMALLEST_SIDE} to {LARGEST_SIDE:,}"
            )
    return numbers if len(numbers) > 1 else numbers[0]


def full_input_size(given: int | tuple[int, ...], channels: int) -> tuple[int, int, int]:
    """Return channels, height and width of an input size that may leave the channels out.

    Args:
        given: What `read_input_size` returns.
        channels: Channels where it names none.

    Example:
        >>> full_input_size(64, 3), full_input_size((256, 512), 1), full_input_size((1, 28, 28), 3)
        ((3, 64, 64), (1, 256, 512), (1, 28, 28))
    """
    if isinstance(given, int):
        return channels, given, given
    height, width = given[-2:]
    return given[0] if len(given) == 3 else channels, height, width


def short_input_size(size: tuple[int, int, int]) -> int | tuple[int, int, int]:
    """Return one number for a square of three channels, else all three."""
    return size[1] if size == (3, size[1], size[1]) else size


def _optional_size(value: Any) -> Any:
    return None if value is None else read_input_size(value)


def _text(value: Any) -> Any:
    """Take a number from a YAML file for the text that it is on the command line."""
    return str(value) if isinstance(value, int | float) and not isinstance(value, bool) else value


SAMPLERS = ("additive", "tpe", "nsga2", "nsga3", "gp", "random")
"""Names of the samplers; `placesearch.search.samplers` makes them."""


def _workers(value: Any) -> Any:
    """Read a number of workers as the command line gives it."""
    if isinstance(value, str | int):
        if value == "auto" or (str(value).isdecimal() and int(value) >= 1):
            return value if value == "auto" else int(value)
        value = str(value)
    raise ValueError(f"{shown(value)} is no number of workers; expected 1 to {MOST_JOBS}, or auto")


def _address(value: Any) -> Any:
    """Read the address of a shared storage."""
    return StorageUrl.parse(value) if isinstance(value, str) else value


class StudyConfig(BaseModel):
    """What to search, on what, and how. The fields bear the names of the options of `placesearch run`.

    A field that is None takes a default that depends on the backbone or the data; `study.yaml` shows what it became.

    Raises:
        InputError: If a value is not legal.

    Example:
        >>> StudyConfig(backbone="resnet18", reductions="4,8").reductions
        (4, 8)
        >>> StudyConfig(backbone="resnet18", timeout="10m").timeout
        600.0
    """

    model_config = ConfigDict(frozen=True, extra="forbid", strict=False)

    backbone: Annotated[str, Field(min_length=1)]
    data: Annotated[str, BeforeValidator(_text), Field(min_length=1)] = "digits"
    skip_corrupt: bool = False
    name: Annotated[str | None, BeforeValidator(_text)] = None
    trials: Annotated[int, Field(ge=1, le=1_000_000)] | None = None
    timeout: Annotated[float, BeforeValidator(_seconds), Field(gt=0)] | None = None
    trial_timeout: Annotated[float, BeforeValidator(_seconds), Field(gt=0)] | None = None
    until: Literal["settled"] | None = None
    epochs: Annotated[int, Field(ge=1, le=100_000)] | None = None
    long_epochs: Annotated[int, Field(ge=0, le=100_000)] | None = None
    batch_size: Annotated[int, Field(ge=2, le=1_000_000)] | None = None
    input_size: Annotated[int | tuple[int, ...] | None, BeforeValidator(_optional_size)] = None
    stem: Literal["original", "small"] = "original"
    weights: Annotated[Annotated[str, Field(min_length=1)] | None, BeforeValidator(_text)] = None
    start: Literal["scratch", "branch", "pretrained"] | None = None
    stop_early: bool = False
    evaluate: Annotated[str, Field(min_length=3, pattern=":")] | None = None
    blocks: Annotated[tuple[str, ...], BeforeValidator(_words), Field(min_length=1)] = ("se", "cbam")
    reductions: Annotated[tuple[Annotated[int, Field(ge=1)], ...], BeforeValidator(_numbers), Field(min_length=1)] = (
        4,
        8,
        16,
    )
    kernel_sizes: Annotated[tuple[int, ...], BeforeValidator(_numbers), Field(min_length=1)] = (3, 7)
    sites: Annotated[tuple[str, ...], BeforeValidator(_words), Field(min_length=1)] = ("residual",)
    objectives: Annotated[tuple[str, ...], BeforeValidator(_words), Field(min_length=1)] = ("accuracy", "params")
    max_macs: Annotated[str, BeforeValidator(_limit)] | None = None
    max_macs_full: Annotated[str, BeforeValidator(_limit)] | None = None
    max_params: Annotated[str, BeforeValidator(_limit)] | None = None
    max_latency: Annotated[str, BeforeValidator(_limit)] | None = None
    sampler: str = "additive"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0
    device: Annotated[str, BeforeValidator(_text)] = "auto"
    max_jobs: Annotated[int, Field(ge=1, le=10_000)] = MOST_JOBS
    jobs: Annotated[int | Literal["auto"], BeforeValidator(_workers)] = "auto"
    engine: Literal["local", "ray"] = "local"
    address: Annotated[str, Field(min_length=1)] | None = None
    gpus_per_worker: Annotated[float, Field(gt=0, le=1)] = 1.0
    storage: Annotated[StorageUrl, BeforeValidator(_address), PlainSerializer(lambda url: url.shown)] | None = None

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InputError(first_problem(error)) from None

    @field_validator("*", mode="before")
    @classmethod
    def _no_truth_for_a_number(cls, value: Any, info: ValidationInfo) -> Any:
        """Refuse `yes` and `true`, which YAML reads as truth values, where something else is meant."""
        if isinstance(value, bool) and info.field_name not in ("skip_corrupt", "stop_early"):
            raise ValueError(f"'{str(value).lower()}' is no value for it; put text into quotes")
        return value

    @field_validator("data", "weights", "backbone")
    @classmethod
    def _unicode(cls, text: str | None) -> str | None:
        if text is not None and printable(text) != text:
            raise ValueError(f"'{printable(text)}' is not plain text (UTF-8 in one line); rename it")
        return text

    @field_validator("sampler")
    @classmethod
    def _known_sampler(cls, name: str) -> str:
        if name not in SAMPLERS:
            raise ValueError(f"unknown sampler '{name}'{did_you_mean(name, SAMPLERS)}; known: {', '.join(SAMPLERS)}")
        return name

    @field_validator("kernel_sizes")
    @classmethod
    def _odd(cls, sizes: tuple[int, ...]) -> tuple[int, ...]:
        for size in sizes:
            if size < 1 or size % 2 == 0:
                raise ValueError(f"{size} is not odd and positive; kernel sizes are odd so that a map keeps its size")
        return sizes

    @field_validator("sites")
    @classmethod
    def _known_kinds(cls, kinds: tuple[str, ...]) -> tuple[str, ...]:
        for kind in kinds:
            if kind not in KINDS:
                raise ValueError(f"unknown kind of site '{kind}'; known: {', '.join(KINDS)}")
        return kinds

    @field_validator("objectives")
    @classmethod
    def _known_objectives(cls, names: tuple[str, ...]) -> tuple[str, ...]:
        for name in names:
            if name not in DIRECTIONS:
                known = ", ".join(DIRECTIONS)
                raise ValueError(f"unknown objective '{name}'{did_you_mean(name, DIRECTIONS)}; known: {known}")
        if "accuracy" not in names:
            raise ValueError("accuracy has to be among the objectives")
        return names

    @field_validator("blocks", "reductions", "kernel_sizes", "sites", "objectives")
    @classmethod
    def _no_repeats(cls, values: tuple[Any, ...]) -> tuple[Any, ...]:
        if len(set(values)) < len(values):
            raise ValueError(f"{','.join(map(str, values))} names something twice")
        return values

    @field_validator("jobs")
    @classmethod
    def _not_too_many(cls, jobs: int | str, info: ValidationInfo) -> int | str:
        most = info.data.get("max_jobs", MOST_JOBS)
        if isinstance(jobs, int) and jobs > most:
            raise ValueError(
                f"{jobs} is no number of workers here; expected 1 to {most}, or auto; a study that begins with "
                f"--max-jobs {jobs} allows it"
            )
        return jobs

    @field_validator("name")
    @classmethod
    def _plain_name(cls, name: str | None) -> str | None:
        if name is not None and not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", name):
            raise ValueError(f"'{name}' is no study name; use letters, digits, '.', '_' and '-'")
        return name

    @property
    def lag(self) -> int:
        """On how many of the last trials a suggestion does not depend, so that as many may still run.

        Up to MOST_JOBS at a time just those that may run beside it. Above, where workers are on several machines and
        of several speeds, as many again, so that not all of them have to wait for the slowest.

        Example:
            >>> StudyConfig(backbone="resnet18").lag, StudyConfig(backbone="resnet18", max_jobs=32).lag
            (7, 63)
        """
        return self.max_jobs - 1 if self.max_jobs <= MOST_JOBS else 2 * self.max_jobs - 1

    def plain(self) -> dict[str, Any]:
        """Return the fields as YAML can hold them."""
        return self.model_dump(mode="json")


RUN_FIELDS = frozenset(
    {"trials", "timeout", "trial_timeout", "until", "device", "jobs", "engine", "address", "gpus_per_worker"}
)
"""Fields that may change from run to run; all others are the identity of a study."""


class _Loader(yaml.SafeLoader):
    """Safe, and without merge keys, of which a few lines can stand for more than fits into memory."""

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Refuse a mapping that is to be merged with others."""
        if any(key.tag == "tag:yaml.org,2002:merge" for key, _ in node.value):
            raise yaml.constructor.ConstructorError(None, None, "merge keys (<<) are not read", node.start_mark)


def read_yaml(path: Path) -> dict[str, Any]:
    """Read a YAML file whose top level is a mapping: plain values only, no tags, no merge keys.

    Raises:
        InputError: If the file cannot be read or holds something else.
    """
    try:
        with path.open(encoding="utf-8") as file:
            text = file.read(LARGEST_FILE + 1)
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}") from None
    except UnicodeDecodeError:
        raise InputError(f"{path} is damaged: it is no YAML text") from None
    return parse_yaml(text, str(path))


def parse_yaml(text: str, where: str) -> dict[str, Any]:
    """Read YAML text in the same way.

    Args:
        text: The text.
        where: What to call it in an error.

    Raises:
        InputError: If it is something else.
    """
    if len(text) > LARGEST_FILE:
        raise InputError(f"{where} has more than {LARGEST_FILE:,} characters; no file of placesearch is that long")
    try:
        content = yaml.load(text, _Loader)  # noqa: S506 - it is a safe one
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or "it is no YAML text"
        raise InputError(f"{where} is damaged{line}: {problem}") from None
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{where} is damaged: its top level is no mapping of names to values")
    return content


def read_definition(path: Path) -> dict[str, Any]:
    """Read a study's definition, `studies/NAME.yaml`: fields of `StudyConfig`, all optional but the backbone.

    The file's name is the study's name unless the file gives one.

    Raises:
        InputError: If the file cannot be read, or has an unknown or illegal field.
    """
    values = {key.replace("-", "_"): value for key, value in read_yaml(path).items()}
    for key in values:
        if key not in StudyConfig.model_fields:
            known = StudyConfig.model_fields
            raise InputError(f"{path}: unknown key '{key}'{did_you_mean(key, known)}; known: {', '.join(known)}")
    values.setdefault("name", path.stem)
    return values
