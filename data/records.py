"""JSON and YAML that somebody else may have written: what is wrong with it is a `ValueError`, whatever it is.

The one place that parses either, so that no file ends a command in the parsers' own errors.
"""

from __future__ import annotations

import functools
import json
import re
from typing import Any

MAX_DEPTH = 100  # lists and objects in one another; Python's own limit would be reached in the middle of other work
MAX_YAML_VALUES = 1_000_000  # with each alias counted as what it stands for, which may be itself
_TOO_DEEP = f"lists and objects are nested more than {MAX_DEPTH} deep"


def parse_json(content: str | bytes) -> Any:
    """The value in a JSON text, which as bytes may begin with a byte order mark. Raises `ValueError`."""
    try:
        value = json.loads(content)
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    if isinstance(content, str):
        opened = content.count("[") + content.count("{")
    else:
        opened = content.count(b"[") + content.count(b"{")
    if opened > MAX_DEPTH:
        _check_size(value, None)
    return value


def parse_yaml(text: str) -> Any:
    """The value in a YAML text, with numbers as YAML 1.2 has them, and every key as text.

    Raises `ValueError`, for a key that is given twice too.
    """
    import yaml

    try:
        value = yaml.load(text, _loader())
    except RecursionError as error:
        raise ValueError(_TOO_DEEP) from error
    except yaml.YAMLError as error:
        raise ValueError(" ".join(str(error).split())) from error
    except (AttributeError, LookupError, TypeError) as error:  # of PyYAML, for a tag that its value does not fit
        raise ValueError(f"a tag (!!) does not fit its value ({error})") from error
    _check_size(value, MAX_YAML_VALUES)
    return value


@functools.cache
def _loader() -> Any:
    """PyYAML's safe loader, which reads YAML 1.1, without what surprises people who have read 1.2.

    In 1.1 the key `on` is true, 1e-3 is a text, 010 is 8 and 1:30 is 90.
    """
    import yaml

    class Loader(yaml.SafeLoader):
        yaml_implicit_resolvers = {
            first: [(tag, pattern) for tag, pattern in known if not tag.endswith((":int", ":float"))]
            for first, known in yaml.SafeLoader.yaml_implicit_resolvers.items()
        }

        def construct_mapping(self, node: Any, deep: bool = False) -> dict[Any, Any]:
            # PyYAML takes the last of two equal keys, and so drops a whole section that was written twice
            given: set[str] = set()
            for key, _ in node.value:
                own = node.start_mark.index <= key.start_mark.index < node.end_mark.index  # not merged from elsewhere
                if isinstance(key, yaml.ScalarNode) and key.value != "<<" and own:
                    if key.value in given:
                        raise yaml.constructor.ConstructorError(
                            None, None, f"{key.value!r} is given twice", key.start_mark
                        )
                    given.add(key.value)
            self.flatten_mapping(node)
            for key, _ in node.value:
                if isinstance(key, yaml.ScalarNode):
                    key.tag = "tag:yaml.org,2002:str"
            return super().construct_mapping(node, deep)

        def construct_whole_number(self, node: Any) -> int:
            text = str(self.construct_scalar(node)).replace("_", "")
            return int(text, 10 if text.lstrip("+-").isdigit() else 0)

    digits = list("-+.0123456789")
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:int", re.compile(r"[-+]?(\d[\d_]*|0x[\da-fA-F_]+|0o[0-7_]+|0b[01_]+)$"), digits
    )
    Loader.add_implicit_resolver(
        "tag:yaml.org,2002:float",
        re.compile(
            r"[-+]?(\d[\d_]*(\.[\d_]*)?[eE][-+]?\d+|\d[\d_]*\.[\d_]*|\.\d[\d_]*([eE][-+]?\d+)?|\.(inf|Inf|INF))$"
            r"|\.(nan|NaN|NAN)$"
        ),
        digits,
    )
    Loader.add_constructor("tag:yaml.org,2002:int", Loader.construct_whole_number)
    return Loader


def _check_size(value: Any, most: int | None) -> None:
    """Raises `ValueError` for lists and objects that are too deep or hold more than `most` values."""
    level = [value]
    held = 0
    for _ in range(MAX_DEPTH):
        inner: list[Any] = []
        for one in level:
            if isinstance(one, dict):
                inner += one.values()
            elif isinstance(one, list):
                inner += one
            if most is not None and held + len(inner) > most:
                raise ValueError(f"it holds more than {most:,} values, with aliases (*) written out")
        held += len(inner)
        level = [one for one in inner if isinstance(one, dict | list)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)
