"""YAML files that people write."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from megatron_rocm.errors import UsageError


def read_yaml(file: str | Path, where: str) -> Any:
    """What a YAML file holds. Raises UsageError that begins with `where`: unreadable, no YAML, a key twice."""
    import yaml

    class Loader(yaml.SafeLoader):
        """Of two lines with one key yaml keeps the last and says nothing."""

        def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
            names = [name.value for name, _ in node.value]
            for number, name in enumerate(names):
                if name in names[:number]:
                    line = node.value[number][0].start_mark.line + 1
                    raise UsageError(f"{where}: line {line}: {name} is named twice; name it once")
            return super().construct_mapping(node, deep)

    try:
        return yaml.load(Path(file).expanduser().read_text(), Loader)
    except OSError as error:
        raise UsageError(f"{where}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UsageError(f"{where}: not YAML: {' '.join(str(error).split())}") from None
