# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read YAML that somebody else wrote, within bounds of size, depth and time.

PyYAML builds whatever a text says. A few hundred bytes of nested merge keys (``<<: [*a, *a]``) keep it busy for
minutes, and a mapping
may have a key twice, of which it keeps the last. Here every node is counted, also each time an alias repeats it, and
a key that is
given twice is refused. An error tells the line and never quotes the text, which may be a secret in the wrong file.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from typing import Any

# Of a file. The largest profile or rule file that anybody showed us has 4 KiB.
LONGEST_FILE = 256 * 1024
MAX_NODES = 20000
# With every alias counted as what it stands for.
MAX_EXPANDED = 100000
MAX_DEPTH = 50
# No number or date is longer. PyYAML reads 1:1:1:... as one number of base 60, which takes quadratic time.
_LONGEST_NUMBER = 100
_TAG = "tag:yaml.org,2002:"
# What may be told of a key that is not known.
_WORD = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]{0,39}", re.ASCII)


class Refused(Exception):
    """The text cannot be used; ``reason`` says why without quoting it, ``line`` counts from 1 (None: not known)."""

    def __init__(self, reason: str, line: int | None = None, column: int | None = None) -> None:
        super().__init__(reason)
        self.reason = reason
        self.line = line
        self.column = column

    @property
    def place(self) -> str:
        """`` in line 3, column 7``, or nothing where that is not known."""
        if self.line is None:
            return ""
        return f" in line {self.line}" + ("" if self.column is None else f", column {self.column}")


class Mapping(dict[Any, Any]):
    """A mapping of a file. ``lines``.

    The line of each key. ``written``: of each plain scalar without quotes, the text as it was written.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[Any, int] = {}
        self.written: dict[Any, str] = {}


class Sequence(list[Any]):
    """A list of a file. ``written``: by its number, the text of each plain scalar without quotes."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, str] = {}


def misread(value: object, written: str | None) -> bool:
    """Return whether YAML turned a plain scalar into a value that is written otherwise.

    012345 becomes 5349, 1_000 becomes 1000, yes becomes true.
    """
    return written is not None and not isinstance(value, str) and str(value) != written


def shown(key: object) -> str:
    """Return a key for a message: quoted if it looks like a word, else not at all."""
    return (
        repr(key)
        if (isinstance(key, str) and _WORD.fullmatch(key)) or (isinstance(key, int) and not isinstance(key, bool))
        else "that key"
    )


def read_text(path: str, longest: int = LONGEST_FILE) -> str:
    """Return the text of a regular file of at most ``longest`` bytes; OSError, UnicodeDecodeError or Refused otherwise.

    Opening a FIFO would wait for a writer, and a device has no end: neither is read.
    """
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise Refused("is not a regular file")
        data = file.read(longest + 1)
    if len(data) > longest:
        raise Refused(f"is larger than {longest // 1024} KiB")
    return data.decode("utf-8")


def compose(text: str) -> tuple[Any, Any]:
    """Return a loader and the root node of the one document in ``text`` (None: it is empty)."""
    import yaml

    loader = None
    try:
        loader = _loader()(text)
        return loader, loader.get_single_node()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _refused(error) from None


def load(text: str) -> Any:
    """Return what ``text`` says, with Mapping for mappings; merge keys are resolved."""
    loader, root = compose(text)
    return None if root is None else _build(loader, root, [MAX_EXPANDED], 0)


@functools.cache
def _loader() -> Any:
    import yaml

    class Bounded(yaml.SafeLoader):
        """Counts nodes and their depth while the tree is made."""

        nodes = 0
        depth = 0

        def compose_node(self, parent: Any, index: Any) -> Any:
            self.nodes += 1
            self.depth += 1
            if self.nodes > MAX_NODES or self.depth > MAX_DEPTH:
                event: Any = self.peek_event()  # type: ignore[no-untyped-call]
                line = event.start_mark.line + 1
                raise Refused(
                    f"has more than {MAX_NODES} values"
                    if self.nodes > MAX_NODES
                    else f"is nested deeper than {MAX_DEPTH} levels",
                    line,
                )
            node = super().compose_node(parent, index)
            self.depth -= 1
            return node

    return Bounded


def _refused(error: Exception) -> Refused:
    mark = getattr(error, "problem_mark", None)
    return Refused("is not valid YAML", mark.line + 1 if mark else None, mark.column + 1 if mark else None)


def _build(loader: Any, node: Any, budget: list[int], depth: int) -> Any:
    import yaml

    line = node.start_mark.line + 1
    budget[0] -= 1
    if budget[0] < 0:
        raise Refused(f"says more than {MAX_EXPANDED} values, aliases counted", line)
    if depth > MAX_DEPTH:
        raise Refused(f"is nested deeper than {MAX_DEPTH} levels", line)
    if isinstance(node, yaml.ScalarNode):
        return scalar(loader, node)
    if node.tag not in (_TAG + "seq", _TAG + "map"):
        raise Refused("has a tag (!) that is not used here", line)
    if isinstance(node, yaml.SequenceNode):
        items = Sequence()
        for number, item in enumerate(node.value):
            items.append(_build(loader, item, budget, depth + 1))
            if _is_plain(item):
                items.written[number] = item.value
        return items
    mapping = Mapping()
    merged: list[Any] = []
    for key_node, value_node in node.value:
        if key_node.tag == _TAG + "merge":
            merged += value_node.value if isinstance(value_node, yaml.SequenceNode) else [value_node]
            continue
        if not isinstance(key_node, yaml.ScalarNode):
            raise Refused("has a list or mapping as a key", key_node.start_mark.line + 1)
        key = scalar(loader, key_node)
        if key in mapping:
            raise Refused(f"gives {shown(key)} twice", key_node.start_mark.line + 1)
        mapping[key] = _build(loader, value_node, budget, depth + 1)
        mapping.lines[key] = key_node.start_mark.line + 1
        if _is_plain(value_node):
            mapping.written[key] = value_node.value
    for other in merged:
        if not isinstance(other, yaml.MappingNode):
            raise Refused("merges (<<) something that is not a mapping", other.start_mark.line + 1)
        values = _build(loader, other, budget, depth + 1)
        for key in [key for key in values if key not in mapping]:
            mapping[key] = values[key]
            mapping.lines[key] = values.lines[key]
            if key in values.written:
                mapping.written[key] = values.written[key]
    return mapping


def _is_plain(node: Any) -> bool:
    import yaml

    return isinstance(node, yaml.ScalarNode) and node.style is None


def scalar(loader: Any, node: Any) -> Any:
    """Return the value of one scalar node."""
    import yaml

    line = node.start_mark.line + 1 if node.start_mark else None
    if node.tag != _TAG + "str" and len(node.value) > _LONGEST_NUMBER:
        raise Refused("has a number that is too long", line)
    try:
        return loader.construct_object(node)
    except (yaml.YAMLError, ValueError, RecursionError):
        raise Refused("has a value that cannot be read", line) from None


def recognise(text: str) -> str | None:
    """Return what the one document in ``text`` is (``mapping``, ``sequence`` or ``scalar``; None: nothing) without
    building it.

    Refused for what PyYAML's safe_load would refuse, and for what is out of bounds once its aliases stand for what
    they repeat.
    """
    import yaml

    root: str | None = None
    events = documents = 0
    # Of each collection that is open: its anchor, its size so far, whether it is a mapping, and how many children it
    # has.
    stack: list[list[Any]] = []
    anchors: dict[str, int] = {}
    try:
        # The reader looks at the first characters already when it is made.
        loader: Any = yaml.SafeLoader(text)
        while loader.check_event():
            event = loader.get_event()
            line = event.start_mark.line + 1
            events += 1
            if events > 2 * MAX_NODES:
                raise Refused(f"has more than {MAX_NODES} values", line)
            if isinstance(event, yaml.DocumentStartEvent):
                documents += 1
                if documents > 1:
                    raise Refused("has more than one document", line)
            kind, size = _recognise_event(yaml, loader, event, stack, anchors, line)
            if kind is None:
                continue
            root = root or kind
            if stack:
                # A collection that has just begun has size 0: its own size counts when it ends.
                stack[-1][1] += size
                if stack[-1][1] > MAX_EXPANDED:
                    raise Refused(f"says more than {MAX_EXPANDED} values, aliases counted", line)
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _refused(error) from None
    return root


def _recognise_event(
    yaml: Any, loader: Any, event: Any, stack: list[list[Any]], anchors: dict[str, int], line: int
) -> tuple[str | None, int]:
    """Return the kind of the node that begins or ends here, and its size once that is known (0.

    Not yet); (None, 0) for other events.
    """
    if isinstance(event, (yaml.MappingEndEvent, yaml.SequenceEndEvent)):
        anchor, size, mapping, _children = stack.pop()
        if anchor:
            anchors[anchor] = size
        return ("mapping" if mapping else "sequence"), size
    if not isinstance(event, yaml.NodeEvent):
        return None, 0
    as_key = bool(stack) and stack[-1][2] and stack[-1][3] % 2 == 0
    if stack:
        stack[-1][3] += 1
    if isinstance(event, yaml.AliasEvent):
        if event.anchor not in anchors:
            raise Refused("has an alias to something that is not complete before it", line)
        return "alias", anchors[event.anchor]
    if isinstance(event, yaml.ScalarEvent):
        tag = (
            event.tag if event.tag not in (None, "!") else loader.resolve(yaml.ScalarNode, event.value, event.implicit)
        )
        if tag not in (_TAG + "str", _TAG + "merge", _TAG + "value"):
            scalar(loader, yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark))
        if event.anchor:
            anchors[event.anchor] = 1
        return "scalar", 1
    if as_key:
        raise Refused("has a list or mapping as a key", line)
    if event.tag not in (None, "!") and not str(event.tag).startswith(_TAG):
        raise Refused("has a tag (!) that cloud-init does not know", line)
    if len(stack) >= MAX_DEPTH:
        raise Refused(f"is nested deeper than {MAX_DEPTH} levels", line)
    stack.append([event.anchor, 1, isinstance(event, yaml.MappingStartEvent), 0])
    return ("mapping" if stack[-1][2] else "sequence"), 0
