"""YAML as settings are written in: strict about what plain YAML lets pass, and with files that build on others."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from training.config.config import overlay
from training.config.flags import ConfigError

BASE = "base"


def parse_yaml(text: str, place: str) -> Any:
    """The value of a YAML text. Raises ConfigError naming the place."""
    import yaml

    class StrictLoader(yaml.SafeLoader):
        """Refuses a key given twice, which plain YAML loading resolves in silence, and aliases, which can multiply."""

        def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
            if self.check_event(yaml.AliasEvent):
                raise yaml.YAMLError("aliases (*name) are not read here")
            return super().compose_node(parent, index)

    def mapping(loader: yaml.SafeLoader, node: yaml.MappingNode) -> dict[Any, Any]:
        keys = [loader.construct_object(key) for key, _ in node.value]
        for key in keys:
            if keys.count(key) > 1:
                raise yaml.YAMLError(f"{key} is given twice")
        return {
            key: loader.construct_object(value, deep=True) for key, (_, value) in zip(keys, node.value, strict=True)
        }

    StrictLoader.add_constructor(yaml.resolver.BaseResolver.DEFAULT_MAPPING_TAG, mapping)
    try:
        return StrictLoader(text).get_single_data()
    except (yaml.YAMLError, ValueError, TypeError, RecursionError) as error:
        raise ConfigError([f"{place}: not valid YAML: {error}"]) from None


def read_yaml(path: str, above: tuple[Path, ...] = ()) -> dict[str, Any]:
    """The mapping in a file, laid over that of the file which its `base` names; base and stages are relative to it.

    `above`: the files that build on this one. Raises ConfigError naming the file.
    """
    file = Path(path).resolve()
    place = f"--config {path}"
    if file in above:
        chain = " -> ".join(each.name for each in (*above, file))
        raise ConfigError([f"{place}: base files that build on each other: {chain}"])
    try:
        values = parse_yaml(file.read_text(encoding="utf-8"), place)
    except OSError as error:
        said = f" (base of {above[-1].name})" if above else ""
        raise ConfigError([f"{place}{said}: {error.strerror}"]) from None
    except UnicodeDecodeError as error:
        raise ConfigError([f"{place}: not valid YAML: {error}"]) from None
    if values is None:
        return {}
    if not isinstance(values, dict):
        raise ConfigError([f"{place}: expected 'flag: value' lines, found {type(values).__name__}"])
    table = values.get("stages")
    names_a_file = isinstance(table, str) and table != "none" and not table.lstrip().startswith("[")
    if names_a_file:
        values["stages"] = str(Path(path).parent / str(table))
    base = values.pop(BASE, None)
    if base is None:
        return values
    if not isinstance(base, str):
        raise ConfigError([f"{place}: base {base} is not the name of a file"])
    return overlay(read_yaml(str(Path(path).parent / base), (*above, file)), values)
