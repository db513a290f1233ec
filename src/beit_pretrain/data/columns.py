"""Which columns of a table (parquet, Arrow) hold the image and the class of a row.

Hugging Face `datasets` notes the type of every column in the schema's metadata, under `huggingface`: `Image` columns
are struct<bytes, path>, `ClassLabel` columns are integers with a list of names. Tables of other programs are judged by
the type of their columns, by names, and by the first bytes of what they hold.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from beit_pretrain.errors import UserError
from beit_pretrain.transforms.image_io import IMAGE_EXTENSIONS, starts_as_image

IMAGES = IMAGE_EXTENSIONS | frozenset("image images img imgs photo picture image_bytes img_bytes bytes jpg".split())
# Names of a class column, the likeliest first: CIFAR-100 has fine_label and coarse_label.
LABELS = "label labels fine_label class class_label cls class_id label_id target category".split()
SHOWN = 20  # columns in a message


class Columns(NamedTuple):
    """The columns that are read."""

    image: str
    label: str | None = None
    classes: tuple[str, ...] = ()  # names of the numbers 0, 1, ... in the label column, if the table has them
    text: bool = False  # the labels are texts, not numbers


def find_columns(
    schema: Any, head: Callable[[str], bytes | None], image_key: Sequence[str] | None, label_key: str | None, where: str
) -> Columns:
    """The columns of image and class in a `pyarrow.Schema`.

    Args:
        head: the first bytes of a value in a column of binary values; None if there is none, or it is not known.
        image_key: names of the image column, the first that the table has; None = the only one that holds images.
        label_key: name of the class column; None = found, if there is one.
        where: name of the table, for messages.

    Raises:
        UserError: there is no such column, or there are several that hold images and `image_key` is None.
    """
    features = _features(schema)
    image = _image(schema, head, image_key, where)
    label = _label(schema, features, image, label_key, where)
    if label is None:
        return Columns(image)
    feature = features.get(label, {})
    names = feature.get("names") if feature.get("_type") == "ClassLabel" else None
    return Columns(image, label, tuple(map(str, names or ())), _is_text(schema.field(label).type))


def image_columns(schema: Any, head: Callable[[str], bytes | None]) -> list[str]:
    """The columns that hold images: those noted as such, else those of the type of images, else of bytes of images."""
    features = _features(schema)
    found = [name for name in schema.names if features.get(name, {}).get("_type") == "Image"]
    found = found or [name for name in schema.names if _is_image_struct(schema.field(name).type)]
    return found or [n for n in schema.names if _is_binary(schema.field(n).type) and _holds_images(n, head(n))]


def class_names_of(schema: Any, column: str) -> list[str]:
    """The names of the numbers in a column of classes; none if the table does not note them."""
    return list(map(str, _features(schema).get(column, {}).get("names") or ()))


def _features(schema: Any) -> dict[str, dict[str, Any]]:
    """The features that `datasets` noted, by column; of lists and groups too, {} = unknown."""
    try:
        noted = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return {name: feature if isinstance(feature, dict) else {} for name, feature in noted.items()}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _image(schema: Any, head: Callable[[str], bytes | None], image_key: Sequence[str] | None, where: str) -> str:
    if image_key:
        lower = {name.lower(): name for name in schema.names}
        name = next((lower[key.lower()] for key in image_key if key.lower() in lower), None)
        if name is None:
            raise UserError(f"{where} has no column image_key={','.join(image_key)}; {_listed(schema.names)}")
        if not (_is_image_struct(schema.field(name).type) or _is_binary(schema.field(name).type)):
            raise UserError(f"{where}: its column {name} holds {schema.field(name).type}, not one image a row")
        return name
    found = image_columns(schema, head)
    if len(found) == 1:
        return found[0]
    if found:
        raise UserError(f"{where} has the image columns {', '.join(found)}; choose one with image_key=")
    if lists := [field.name for field in schema if _is_list_of_images(field.type)]:
        raise UserError(f"{where} holds lists of images in {', '.join(lists)}; one image a row can be read")
    raise UserError(f"{where} has no column of images; {_listed(schema.names)}")


def _label(
    schema: Any, features: dict[str, dict[str, Any]], image: str, label_key: str | None, where: str
) -> str | None:
    if label_key is not None:
        if label_key not in schema.names:
            raise UserError(f"{where} has no column label_key={label_key}; {_listed(schema.names)}")
        kind = schema.field(label_key).type
        if not (_is_integer(kind) or _is_text(kind)):
            raise UserError(f"{where}: its column {label_key} holds {kind}, not one class a row")
        return label_key
    named = [n for n in schema.names if features.get(n, {}).get("_type") == "ClassLabel"]
    named = [n for n in named if _is_integer(schema.field(n).type)]
    usual = [n for n in schema.names if n.lower() in LABELS and n != image]
    usual = (
        named
        or [n for n in usual if _is_integer(schema.field(n).type)]
        or ([n for n in usual if _is_text(schema.field(n).type)])
    )
    if len(usual) == 1:
        return usual[0]
    return min((n for n in usual if n.lower() in LABELS), key=lambda n: LABELS.index(n.lower()), default=None)


def _is_binary(kind: Any) -> bool:
    return str(kind) in ("binary", "large_binary", "binary_view")


def _is_text(kind: Any) -> bool:
    return str(kind).startswith(("string", "large_string", "dictionary<values=string"))


def _is_integer(kind: Any) -> bool:
    return str(kind).startswith(("int", "uint"))


def _is_image_struct(kind: Any) -> bool:
    return str(kind).startswith("struct<") and any(f.name == "bytes" and _is_binary(f.type) for f in kind)


def _is_list_of_images(kind: Any) -> bool:
    return (
        hasattr(kind, "value_type")
        and "list" in str(kind)
        and (_is_image_struct(kind.value_type) or _is_binary(kind.value_type))
    )


def _holds_images(name: str, head: bytes | None) -> bool:
    return name.lower() in IMAGES if head is None else starts_as_image(head)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return f"its columns are {', '.join(names[:SHOWN])}{', ...' if len(names) > SHOWN else ''}"
