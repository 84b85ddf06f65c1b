# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""Read YAML of other people within bounds of size, depth and time.

PyYAML has no bounds: a few hundred bytes of nested merge keys (``<<: [*a, *a]``) keep it busy for minutes. PyYAML also
accepts a key twice in a mapping, and keeps the last. Here every node is counted, also each time an alias repeats it,
and a repeated key is refused. An error names the line and never quotes the text, which may be a secret.
"""

from __future__ import annotations

import functools
import os
import re
import stat
from typing import Any

# Bytes of a file. The largest profile or rule file that we have seen has 4 KiB.
LONGEST_FILE = 256 * 1024
MAX_NODES = 20000
# Values of a document. An alias counts as all values that it stands for.
MAX_EXPANDED = 100000
MAX_DEPTH = 50
# No number or date is longer. PyYAML reads 1:1:1:... as one number of base 60, which takes quadratic time.
_LONGEST_NUMBER = 100
_TAG = "tag:yaml.org,2002:"
# A message may quote an unknown key of this form.
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
        """Return the place for a message, such as `` in line 3, column 7``; "" if the line is not known."""
        if self.line is None:
            return ""
        return f" in line {self.line}" + ("" if self.column is None else f", column {self.column}")


class Mapping(dict[Any, Any]):
    """A mapping of a file.

    ``lines``: the line of each key. ``written``: the written text of each scalar without quotes, by its key.
    """

    def __init__(self) -> None:
        super().__init__()
        self.lines: dict[Any, int] = {}
        self.written: dict[Any, str] = {}


class Sequence(list[Any]):
    """A list of a file. ``written``: the written text of each scalar without quotes, by its number."""

    def __init__(self) -> None:
        super().__init__()
        self.written: dict[int, str] = {}


def is_misread(value: object, written: str | None) -> bool:
    """Return whether YAML turned a scalar without quotes into a value with another text.

    012345 becomes 5349, 1_000 becomes 1000, yes becomes true.
    """
    return written is not None and not isinstance(value, str) and str(value) != written


def show_key(key: object) -> str:
    """Return a key for a message: quoted if it looks like a word, else "that key"."""
    return (
        repr(key)
        if (isinstance(key, str) and _WORD.fullmatch(key)) or (isinstance(key, int) and not isinstance(key, bool))
        else "that key"
    )


def read_text(path: str, longest: int = LONGEST_FILE) -> str:
    """Return the text of a regular file of at most ``longest`` bytes.

    Raises OSError, UnicodeDecodeError or Refused. A FIFO or a device is refused: opening or reading it may never end.
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
    """Return a loader and the root node of the only document in ``text`` (None: the text is empty). Raises Refused."""
    import yaml

    loader = None
    try:
        loader = _make_loader()(text)
        return loader, loader.get_single_node()
    except (yaml.YAMLError, RecursionError, ValueError) as error:
        raise _make_refusal(error) from None


def load(text: str) -> Any:
    """Return the value of ``text``, with Mapping and Sequence, and merge keys resolved. Raises Refused."""
    loader, root = compose(text)
    return None if root is None else _build_value(loader, root, [MAX_EXPANDED], 0)


@functools.cache
def _make_loader() -> Any:
    import yaml

    class Bounded(yaml.SafeLoader):
        """A loader that counts nodes and their depth while it makes the tree."""

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


def _make_refusal(error: Exception) -> Refused:
    mark = getattr(error, "problem_mark", None)
    return Refused("is not valid YAML", mark.line + 1 if mark else None, mark.column + 1 if mark else None)


def _build_value(loader: Any, node: Any, budget: list[int], depth: int) -> Any:
    """Return the value of a node. ``budget`` has one item: how many values may still be built."""
    import yaml

    line = node.start_mark.line + 1
    budget[0] -= 1
    if budget[0] < 0:
        raise Refused(f"says more than {MAX_EXPANDED} values, aliases counted", line)
    if depth > MAX_DEPTH:
        raise Refused(f"is nested deeper than {MAX_DEPTH} levels", line)
    if isinstance(node, yaml.ScalarNode):
        return read_scalar(loader, node)
    if node.tag not in (_TAG + "seq", _TAG + "map"):
        raise Refused("has a tag (!) that is not used here", line)
    if isinstance(node, yaml.SequenceNode):
        items = Sequence()
        for number, item in enumerate(node.value):
            items.append(_build_value(loader, item, budget, depth + 1))
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
        key = read_scalar(loader, key_node)
        if key in mapping:
            raise Refused(f"gives {show_key(key)} twice", key_node.start_mark.line + 1)
        mapping[key] = _build_value(loader, value_node, budget, depth + 1)
        mapping.lines[key] = key_node.start_mark.line + 1
        if _is_plain(value_node):
            mapping.written[key] = value_node.value
    for other in merged:
        if not isinstance(other, yaml.MappingNode):
            raise Refused("merges (<<) something that is not a mapping", other.start_mark.line + 1)
        values = _build_value(loader, other, budget, depth + 1)
        for key in [key for key in values if key not in mapping]:
            mapping[key] = values[key]
            mapping.lines[key] = values.lines[key]
            if key in values.written:
                mapping.written[key] = values.written[key]
    return mapping


def _is_plain(node: Any) -> bool:
    import yaml

    return isinstance(node, yaml.ScalarNode) and node.style is None


def read_scalar(loader: Any, node: Any) -> Any:
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
    """Return the kind of the only document in ``text``: ``mapping``, ``sequence`` or ``scalar``; None if it is empty.

    The document is not built. Raises Refused for a text that PyYAML's safe_load would refuse, and for a text that is
    out of bounds with its aliases counted as all values that they stand for.
    """
    import yaml

    root: str | None = None
    events = documents = 0
    # For each open collection: its anchor, its size so far, whether it is a mapping, and the number of its children.
    stack: list[list[Any]] = []
    anchors: dict[str, int] = {}
    try:
        # The constructor already reads the first characters, and may raise.
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
        raise _make_refusal(error) from None
    return root


def _recognise_event(
    yaml: Any, loader: Any, event: Any, stack: list[list[Any]], anchors: dict[str, int], line: int
) -> tuple[str | None, int]:
    """Return the kind of the node that begins or ends here, and its size; (None, 0) for other events.

    The size of a collection is 0 at its begin, and known at its end.
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
            read_scalar(loader, yaml.ScalarNode(tag, event.value, event.start_mark, event.end_mark))
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
