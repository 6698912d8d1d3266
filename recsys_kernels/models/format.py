"""The format of a model folder: what each file may hold, and the checks that refuse anything else.

Whoever loads a model folder may not know who wrote it. So sizes are bounded before anything is parsed or allocated,
only regular files are read, and every field is validated. The hashes in `model.json` show damage. They do not show
tampering, since whoever changes a file can compute them anew: for that there is the key of `save_model`.
"""

from __future__ import annotations

import errno
import hashlib
import hmac
import json
import math
import os
import stat
from collections.abc import Iterator, Mapping, Sequence, Set
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import IO, Any

from .dlrm import MLP_FORMS, SPARSE_FORMS, DLRMConfig, layer_pattern

FORMAT, KIND = 1, "dlrm"
WEIGHTS, CONFIG, VOCABULARIES = "model.safetensors", "model.json", "vocabularies.json"

# Bounds that no model of this kind comes near. They keep a small file from asking for a large amount of work.
MAX_CONFIG_BYTES = 2 << 20
MAX_HEADER_BYTES = 4 << 20
MAX_FEATURES = 1024  # dense ones, categorical ones and tables, each
MAX_LAYERS = 64  # layers of an MLP
MAX_WIDTH = 1 << 16  # width of a layer and of an embedding row
MAX_TEXT = 1024  # characters of a name
MAX_TOKEN_BYTES = 1024  # bytes of a vocabulary's token in its file, on average
MAX_WEIGHT = 2.0**20  # magnitude of a weight or a scale: sums of products of such weights stay far from infinity

# How a pruned layer is stored -> rows and columns of a block; 2:4 has none.
PATTERNS: dict[str, tuple[int, int] | None] = {
    "unstructured": (1, 1),
    "2:4": None,
    **{f"block{r}x{c}": (r, c) for r in (1, 4, 16) for c in (1, 4, 16) if r * c > 1},
}

_BODY_KEYS = {"format", "kind", "config", "schema", "sha256", "self_sha256"}
_PIECE = 1 << 20


class ModelFileError(ValueError):
    """A model folder that cannot be served; the message is one line naming the file and the reason.

    `load_model` raises nothing else because of a folder's content.
    """


class MissingModelFileError(FileNotFoundError, ModelFileError):
    """A file of a model folder is not there."""


# ---- reading ----


@contextmanager
def open_regular(path: Path, limit: int | None = None) -> Iterator[tuple[IO[bytes], int]]:
    """Opens a regular file and yields (file, size in bytes); a pipe or a device is neither read nor waited for.

    Raises:
        ModelFileError: there is no such file, it is not a regular file, it cannot be read, or it is over `limit` bytes.
    """
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError:
        raise MissingModelFileError(errno.ENOENT, "no such model file", str(path)) from None
    except OSError as error:
        raise ModelFileError(f"{path}: cannot be read ({error.strerror or error})") from None
    found = os.fstat(descriptor)
    if not stat.S_ISREG(found.st_mode):
        os.close(descriptor)
        raise ModelFileError(f"{path}: is not a regular file")
    with open(descriptor, "rb") as file:
        if limit is not None and found.st_size > limit:
            raise ModelFileError(f"{path}: has {found.st_size:,} bytes, but at most {limit:,} belong there")
        yield file, found.st_size


def file_sha256(path: Path, limit: int | None = None) -> str:
    """Hexadecimal SHA-256 of a regular file of at most `limit` bytes."""
    digest = hashlib.sha256()
    with open_regular(path, limit) as (file, size):
        left = size
        while left and (piece := file.read(min(left, _PIECE))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def read_json(path: Path, limit: int) -> Any:
    """The JSON value in a file of at most `limit` bytes.

    Raises:
        ModelFileError: see `open_regular`; or the text is no JSON, has NaN or infinity, or a key twice.
    """
    with open_regular(path, limit) as (file, size):
        content = file.read(size)
    return _parse_json(path, content)


def _parse_json(path: Path, content: bytes) -> Any:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            raise ModelFileError(f"{path}: a key stands twice in it")
        return found

    def refuse(constant: str) -> float:
        raise ModelFileError(f"{path}: holds {constant}, which is not a number")

    try:
        return json.loads(content.decode("utf-8"), object_pairs_hook=unique, parse_constant=refuse)
    except ModelFileError:
        raise
    except (ValueError, RecursionError):
        raise ModelFileError(f"{path}: was cut short or altered (is not JSON)") from None


# ---- model.json ----


def digest(body: Mapping[str, Any]) -> str:
    """SHA-256 of the content of `model.json` without its own hash."""
    return hashlib.sha256(_canonical(body)).hexdigest()


def signature(body: Mapping[str, Any], key: bytes) -> str:
    """HMAC-SHA-256 of the content of `model.json`; since that holds the other files' hashes, it covers them too."""
    unsigned = {name: value for name, value in body.items() if name not in ("self_sha256", "hmac_sha256")}
    return hmac.new(key, _canonical(unsigned), hashlib.sha256).hexdigest()


def _canonical(body: Mapping[str, Any]) -> bytes:
    return json.dumps(body, sort_keys=True).encode()


def check_key(key: bytes | None) -> None:
    """Raises TypeError or ValueError for a key that is no secret."""
    if key is not None and not isinstance(key, (bytes, bytearray)):
        raise TypeError(f"key must be bytes, but is a {type(key).__name__}")
    if key is not None and len(key) < 16:
        raise ValueError(f"key must have at least 16 bytes, but has {len(key)}; take secrets.token_bytes(32)")


def read_config(path: Path, key: bytes | None) -> tuple[DLRMConfig, dict[str, Any], dict[str, str]]:
    """Reads and checks `model.json`.

    Args:
        path: the file.
        key: what the folder must be signed with; None asks for no signature.

    Returns:
        (shape of the model, `Schema.to_json`, SHA-256 of the other two files).
    """
    body = read_json(path, MAX_CONFIG_BYTES)
    if not isinstance(body, dict) or body.get("format") != FORMAT or body.get("kind") != KIND:
        raise ModelFileError(f"{path}: is not a model of format {FORMAT}")
    check = _Check(path)
    check.keys("the file", body, _BODY_KEYS, {"hmac_sha256"})
    own = body.pop("self_sha256")
    if own != digest(body):
        raise ModelFileError(f"{path}: was altered (SHA-256 differs)")
    if key is not None:
        given = body.get("hmac_sha256")
        if given is None:
            raise ModelFileError(f"{path}: is not signed, but a key was given")
        if not isinstance(given, str) or not hmac.compare_digest(given.encode(), signature(body, key).encode()):
            raise ModelFileError(f"{path}: is not signed with this key, or was altered")
    hashes = body["sha256"]
    check.keys("sha256", hashes, {WEIGHTS, VOCABULARIES})
    config = _config(check, body["config"])
    check_schema(check, body["schema"], config)
    return config, body["schema"], hashes


class _Check:
    """Checks of single fields; each failure is a `ModelFileError` that names the file and the field."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def fail(self, what: str) -> ModelFileError:
        return ModelFileError(f"{self._path}: {what}")

    def keys(self, name: str, value: Any, needed: Set[str], optional: Set[str] = frozenset()) -> None:
        if not isinstance(value, dict):
            raise self.fail(f"{name} is not an object")
        if missing := sorted(needed - value.keys()):
            raise self.fail(f"{name} lacks {missing[0]!r}")
        if unknown := sorted(value.keys() - needed - optional):
            raise self.fail(f"{name} has {unknown[0]!r:.60}, which format {FORMAT} does not know")

    def items(self, name: str, value: Any, most: int, least: int = 0) -> list[Any]:
        if not isinstance(value, list) or not least <= len(value) <= most:
            raise self.fail(f"{name} is not a list of {least} to {most:,} entries")
        return value

    def whole(self, name: str, value: Any, least: int, most: int) -> int:
        if type(value) is not int or not least <= value <= most:
            raise self.fail(f"{name} is {value!r:.60}, not a whole number from {least} to {most:,}")
        return value

    def number(self, name: str, value: Any) -> float:
        if type(value) not in (int, float) or not abs(value) <= 1e30:
            raise self.fail(f"{name} is {value!r:.60}, not a number")
        return float(value)

    def text(self, name: str, value: Any) -> str:
        if not isinstance(value, str) or not 1 <= len(value) <= MAX_TEXT:
            raise self.fail(f"{name} is {value!r:.60}, not a text of 1 to {MAX_TEXT} characters")
        return value

    def one_of(self, name: str, value: Any, known: Sequence[str]) -> str:
        if not isinstance(value, str) or value not in known:
            raise self.fail(f"{name} is {value!r:.60}, not one of {', '.join(known)}")
        return value

    def unique(self, name: str, values: Sequence[str]) -> None:
        if len(set(values)) != len(values):
            twice = next(value for value in values if values.count(value) > 1)
            raise self.fail(f"{name} {twice!r:.60} stands twice")


def _config(check: _Check, state: Any) -> DLRMConfig:
    """The shape of the model, from `DLRMConfig.to_json`."""
    needed = {"num_dense", "tables", "dim", "bottom", "top", "dropout", "embedding"}
    check.keys("config", state, needed, {"mlp", "mlp_pattern"})  # models from before MLPs had forms lack these
    for table in check.items("config.tables", state["tables"], MAX_FEATURES, 1):
        check.keys("a table", table, {"name", "rows", "features", "pooling"})
        name = check.text("a table's name", table["name"])
        if "." in name:
            raise check.fail(f"a table's name {name!r:.60} holds a dot")
        check.whole(f"rows of table {name!r:.60}", table["rows"], 1, 2**48)
        for feature in check.items(f"features of table {name!r:.60}", table["features"], MAX_FEATURES, 1):
            check.text(f"a feature of table {name!r:.60}", feature)
        check.one_of(f"pooling of table {name!r:.60}", table["pooling"], ("sum", "mean", "max"))
    check.whole("config.num_dense", state["num_dense"], 0, MAX_FEATURES)
    check.whole("config.dim", state["dim"], 1, MAX_WIDTH)
    for name in ("bottom", "top"):
        for width in check.items(f"config.{name}", state[name], MAX_LAYERS - 1):
            check.whole(f"a width of config.{name}", width, 1, MAX_WIDTH)
    if not 0 <= check.number("config.dropout", state["dropout"]) < 1:
        raise check.fail(f"config.dropout is {state['dropout']}, not from 0 to below 1")
    check.one_of("config.embedding", state["embedding"], ("float32", "int8", "int4"))
    form = check.one_of("config.mlp", state.get("mlp", "float32"), (*MLP_FORMS, *SPARSE_FORMS))
    pattern = state.get("mlp_pattern")
    if pattern is not None and (form not in SPARSE_FORMS or not isinstance(pattern, str) or pattern not in PATTERNS):
        raise check.fail(f"config.mlp_pattern is {pattern!r:.60}, which an MLP of the form {form} cannot have")
    config = DLRMConfig.from_json(state)
    check.unique("table", [table.name for table in config.tables])
    check.unique("feature", config.feature_names)
    if len(config.feature_names) > MAX_FEATURES:
        raise check.fail(f"config.tables has over {MAX_FEATURES:,} features")
    return config


def check_schema(check: _Check, state: Any, config: DLRMConfig) -> None:
    """Checks `Schema.to_json` and that the model's shape fits it."""
    check.keys("schema", state, {"dense", "features", "bags"})
    names = []
    for entry in check.items("schema.dense", state["dense"], MAX_FEATURES):
        check.keys("a dense feature", entry, {"name", "log", "mean", "std"}, {"low", "high", "minimum"})
        name = check.text("a dense feature's name", entry["name"])
        names.append(name)
        if not isinstance(entry["log"], bool):
            raise check.fail(f"log of feature {name!r:.60} is {entry['log']!r:.60}, not true or false")
        for part in ("mean", "std", "low", "high", "minimum"):
            if entry.get(part) is not None or part in ("mean", "std"):
                check.number(f"{part} of feature {name!r:.60}", entry[part])
        if entry["std"] <= 0:
            raise check.fail(f"std of feature {name!r:.60} is {entry['std']}, not above 0")
        low, high = entry.get("low"), entry.get("high")
        if (low is None) != (high is None) or (low is not None and low > high):
            raise check.fail(f"low and high of feature {name!r:.60} are {low!r:.60} and {high!r:.60}, no range")
    if len(names) != config.num_dense:
        raise check.fail(f"schema.dense has {len(names)} features, but config.num_dense is {config.num_dense}")
    wanted = [[feature, table.name] for table in config.tables for feature in table.features]
    if state["features"] != wanted:
        raise check.fail("schema.features differ from those of config.tables")
    features = [feature for feature, _ in wanted]
    check.unique("feature", [*names, *features])
    for feature in check.items("schema.bags", state["bags"], MAX_FEATURES):
        check.one_of("an entry of schema.bags", feature, features)
    check.unique("an entry of schema.bags,", state["bags"])


# ---- vocabularies.json ----


def vocabularies_limit(config: DLRMConfig) -> int:
    """Most bytes that the vocabularies of a model can have; they grow with the tables."""
    return (1 << 20) + MAX_TOKEN_BYTES * sum(table.rows for table in config.tables)


def check_vocabularies(path: Path, tokens: Any, config: DLRMConfig) -> None:
    """Checks the tokens of each table.

    Args:
        path: the file that `tokens` came from, for the error.
        tokens: the table's name -> its tokens, one for each row but the first.
        config: shape of the model.
    """
    check = _Check(path)
    check.keys("the file", tokens, {table.name for table in config.tables})
    for table in config.tables:
        found = tokens[table.name]
        if not isinstance(found, list) or not all(isinstance(token, str) for token in found):
            raise check.fail(f"the vocabulary of table {table.name!r:.60} is not a list of texts")
        if len(found) + 1 != table.rows:
            raise check.fail(
                f"the vocabulary of table {table.name!r:.60} has {len(found):,} tokens, but a table of "
                f"{table.rows:,} rows needs {table.rows - 1:,}"
            )
        if len(set(found)) != len(found):
            raise check.fail(f"the vocabulary of table {table.name!r:.60} holds a token twice")


# ---- model.safetensors ----

_BYTES = {"F32": 4, "F16": 2, "U8": 1, "I8": 1, "I32": 4, "I64": 8}
Tensors = dict[str, tuple[str, tuple[int | None, ...]]]


def expected_tensors(config: DLRMConfig) -> Tensors:
    """Name -> (data type as safetensors names it, shape); None in a shape: as many as weights were kept."""
    out: Tensors = {}
    for table in config.tables:
        prefix = f"embeddings.embedding_bags.{table.name}."
        if config.embedding == "float32":
            out[prefix + "weight"] = ("F32", (table.rows, config.dim))
            continue
        columns = config.dim if config.embedding == "int8" else (config.dim + 1) // 2
        out[prefix + "weight"] = ("U8", (table.rows, columns))
        out[prefix + "scale_bias"] = ("F16", (table.rows, 2))
        out[prefix + "exponent"] = ("I64", ())
    count = len(config.feature_names) + 1
    widths = {
        "bottom": (config.num_dense, *config.bottom, config.dim),
        "top": (config.dim + count * (count - 1) // 2, *config.top, 1),
    }
    if config.mlp in SPARSE_FORMS:
        layer, step = _sparse_tensors, {"bottom": 1, "top": 1}
    elif config.mlp == "float32":
        layer, step = _float_tensors, {"bottom": 2, "top": 3 if config.dropout else 2}  # with ReLU and dropout between
    else:
        layer, step = _int8_tensors, {"bottom": 1, "top": 1}
    for name, sizes in widths.items():
        for number, (inputs, outputs) in enumerate(pairwise(sizes)):
            prefix = f"head.{name}.{number * step[name]}."
            out.update({prefix + part: tensor for part, tensor in layer(config, inputs, outputs).items()})
    return out


def _float_tensors(config: DLRMConfig, inputs: int, outputs: int) -> Tensors:
    return {"weight": ("F32", (outputs, inputs)), "bias": ("F32", (outputs,))}


def _int8_tensors(config: DLRMConfig, inputs: int, outputs: int) -> Tensors:
    out: Tensors = {
        "weight": ("I8", (outputs, inputs)),
        "weight_scale": ("F32", (outputs, 1)),
        "bias": ("F32", (outputs,)),
    }
    if config.mlp == "int8-static":
        out["input_qparams"] = ("F32", (2,))
    return out


def _sparse_tensors(config: DLRMConfig, inputs: int, outputs: int) -> Tensors:
    activation = SPARSE_FORMS[config.mlp]
    pattern = layer_pattern(outputs, config.mlp_pattern or "unstructured")
    values = "F32" if activation is None else "I8"
    block = PATTERNS[pattern]
    out: Tensors = {"bias": ("F32", (outputs,))}
    if block is None:  # 2:4: two of four weights, and two bits for the place of each
        out["values"] = (values, (outputs, -(-inputs // 4) * 2))
        out["crow_indices"] = ("I32", (0,))
        out["col_indices"] = ("U8", (outputs, None))
    else:
        out["values"] = (values, (None,) if block == (1, 1) else (None, *block))
        out["crow_indices"] = ("I32", (-(-outputs // block[0]) + 1,))
        out["col_indices"] = ("I32", (None,))
    if activation is not None:
        out["weight_scale"] = ("F32", (outputs,))
    if activation == "static":
        out["input_qparams"] = ("F32", (2,))
    return out


def check_weights(path: Path, config: DLRMConfig) -> int:
    """Checks the header of the weights' file and returns the file's size in bytes.

    Since every tensor must have the shape that the configuration gives it, and lie in the file, what is allocated for
    the model afterwards is no more than the file has.
    """
    with open_regular(path) as (file, size):
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > min(MAX_HEADER_BYTES, size - 8):
            raise ModelFileError(f"{path}: was cut short or altered (its header does not fit)")
        header = _parse_json(path, file.read(length))
    if not isinstance(header, dict):
        raise ModelFileError(f"{path}: its header is not an object")
    header.pop("__metadata__", None)
    expected = expected_tensors(config)
    if different := sorted(header.keys() ^ expected.keys()):
        name = different[0]
        raise ModelFileError(f"{path}: {'lacks the' if name in expected else 'has another'} tensor {name!r:.120}")
    spans = [_span(path, name, header[name], *wanted) for name, wanted in expected.items()]
    place = 0
    for begin, end in sorted(spans):
        if begin != place:
            raise ModelFileError(f"{path}: its tensors overlap or leave gaps")
        place = end
    if place != size - 8 - length:
        raise ModelFileError(f"{path}: was cut short or altered (has {size:,} bytes, not {8 + length + place:,})")
    return size


def _span(path: Path, name: str, entry: Any, dtype: str, shape: tuple[int | None, ...]) -> tuple[int, int]:
    """The first byte of a tensor in the data of the weights' file, and the byte after its last one."""
    check = _Check(path)
    check.keys(f"tensor {name!r:.120}", entry, {"dtype", "shape", "data_offsets"})
    found = [check.whole(f"a size of {name!r:.120}", n, 0, 2**48) for n in check.items("a shape", entry["shape"], 3)]
    fits = len(found) == len(shape) and all(want in (None, have) for have, want in zip(found, shape, strict=True))
    if entry["dtype"] != dtype or not fits:
        wanted = ", ".join("any" if size is None else str(size) for size in shape)
        raise check.fail(f"tensor {name!r:.120} is {entry['dtype']!r:.20} {found}, not {dtype} [{wanted}]")
    ends = check.items(f"data_offsets of {name!r:.120}", entry["data_offsets"], 2, 2)
    begin, end = (check.whole(f"an offset of {name!r:.120}", value, 0, 2**62) for value in ends)
    if end - begin != math.prod(found) * _BYTES[dtype]:
        raise check.fail(f"tensor {name!r:.120} has {end - begin:,} bytes, which its shape does not take")
    return begin, end


def check_hashes(folder: Path, hashes: Mapping[str, Any], limits: Mapping[str, int]) -> None:
    """Compares the SHA-256 of each file with the one in `model.json`."""
    for name, expected in hashes.items():
        if file_sha256(folder / name, limits[name]) != expected:
            raise ModelFileError(f"{folder / name}: was cut short or altered (SHA-256 differs from {CONFIG})")


def check_saved(path: Path, body: Mapping[str, Any], tokens: Mapping[str, Sequence[str]]) -> None:
    """Raises ModelFileError for a model that could be written to `path` but not be loaded again."""
    check = _Check(path)
    config = _config(check, body["config"])
    check_schema(check, body["schema"], config)
    check_vocabularies(path.with_name(VOCABULARIES), tokens, config)
