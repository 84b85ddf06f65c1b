# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""The patterns of valid values, each with a description for messages.

Creations and profiles are checked by the same patterns.
"""

from __future__ import annotations

import ipaddress
import json
import re

from .errors import InvalidInput

Word = tuple[re.Pattern[str], str]

MIN_VMID, MAX_VMID = 100, 999999999
# The lowest and highest value of each whole number of a creation.
RANGES = {"cores": (1, 512), "memory": (16, 16777216), "vlan_tag": (1, 4094), "second_vlan_tag": (1, 4094)}
_UNITS = {"memory": ", in MiB and without a unit (4G is 4096)"}

DNS_NAME: Word = (
    re.compile(
        r"(?=.{1,253}\Z)(?![^.]{64})[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?"
        r"(\.(?![^.]{64})[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*",
        re.ASCII,
    ),
    "a DNS name of letters, digits, dots and hyphens, each part 63 characters at most, 253 in all",
)
TAG: Word = (re.compile(r"[a-z0-9_][a-z0-9_+.-]*", re.ASCII), "lower-case letters, digits and _ + . -")
SIZE: Word = (
    re.compile(r"\+?\d{1,7}(\.\d{1,3})? ?[KMGTkmgt]([Ii]?[Bb])?", re.ASCII),
    "a size such as 20G, or +10G to add to the template's",
)
IPCONFIG: Word = (
    re.compile(r"[A-Za-z0-9][A-Za-z0-9.:/=,-]{0,199}", re.ASCII),
    "such as ip=dhcp or ip=192.0.2.10/24,gw=192.0.2.1",
)
WORD: Word = (re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII), "letters, digits, dot, hyphen and underscore")
# Proxmox VE would take a pool named --purge; on a command line (pvesh, pveum) that is an option.
POOL: Word = (
    re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9._][A-Za-z0-9._-]{0,99}){0,2}", re.ASCII),
    "letters, digits, dot, hyphen and underscore, no hyphen first, nested by /",
)
NAMESERVER: Word = (re.compile(r"[0-9A-Fa-f.: ]{2,200}"), "IP addresses separated by blanks or commas")
SEARCHDOMAIN: Word = (
    re.compile(r"[A-Za-z0-9_][A-Za-z0-9_. -]{0,252}", re.ASCII),
    "a domain such as example.org; several separated by blanks",
)
# The names that useradd takes. Service accounts of a Windows domain end in $.
USER: Word = (
    re.compile(r"(?=.{1,32}\Z)[A-Za-z_][A-Za-z0-9_.-]*\$?", re.ASCII),
    "a user name of letters, digits, dot, hyphen and underscore, which may end in $",
)
CPU: Word = (
    re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,59}(,[a-z-]+=[A-Za-z0-9+;._-]{1,200})*", re.ASCII),
    "a CPU type of Proxmox VE such as host or x86-64-v2-AES",
)
VOLUME: Word = (
    re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}:snippets/[A-Za-z0-9][A-Za-z0-9._-]{0,199}", re.ASCII),
    "the volume id of a snippet, such as local:snippets/vendor.yaml",
)
FIREWALL_GROUP: Word = (
    re.compile(r"[A-Za-z][A-Za-z0-9_-]{1,17}", re.ASCII),
    "the name of a security group, 2 to 18 letters, digits, - and _",
)
# One option of a key of authorized_keys, such as restrict or from="192.0.2.0/24"; blanks and commas within quotes
# belong to it.
_KEY_OPTION = r'[A-Za-z][A-Za-z0-9-]*(?:="(?:[^"\\\n]|\\[^\n])*")?'
PUBLIC_KEY: Word = (
    re.compile(rf"(?:{_KEY_OPTION}(?:,{_KEY_OPTION})*[ \t]+)?(?:ssh-|ecdsa-|sk-)\S+[ \t]+\S[^\n\r]*"),
    "a public key in one line (options, type, key, comment)",
)
# The models of network card that Proxmox VE offers for new VMs.
MODELS = ("virtio", "e1000", "e1000e", "rtl8139", "vmxnet3")


# A bullet of a list in YAML or Markdown.
_BULLET = re.compile(r"[-*\u2022][ \t\u00a0]+")
# Characters without a width that web pages and editors leave in a text.
_INVISIBLE = re.compile("[\u200b\u2060\ufeff]")
_QUOTED = re.compile(r"\"[^\"]*\"|'[^']*'")


def split_lines(value: object) -> list[str]:
    """Return the lines of a text or a list: stripped, without empty lines and comments (``#``).

    For SSH keys, whose options contain commas. Each line may be quoted, or an item of a YAML list (``- item``); the
    whole text may be a list in JSON or in YAML's short form (``[a, b]``).

    ``value`` is a text (a survey's textarea, a file; CRLF too), a list of texts, or one value of another kind.
    """
    if value is None:
        return []
    if isinstance(value, (list, tuple)):
        texts = [item.strip() for item in value if isinstance(item, str)]
        if len(texts) == len(value) > 1 and texts[0].startswith("[") and texts[-1].endswith("]"):
            # Ansible has split the text of a list at its commas.
            return split_lines(",".join(texts))
        return [line for item in value for line in split_lines(item)]
    text = _INVISIBLE.sub("", str(value)).strip()
    if text.startswith("[") and text.endswith("]"):
        return _parse_list(text)
    lines = (_BULLET.sub("", line.strip(), count=1) for line in re.split(r"\r\n|\r|\n", text))
    return [_unquote(line) for line in lines if line and not line.startswith("#")]


def _parse_list(text: str) -> list[str]:
    """Return the items of a list in JSON, or of one in YAML's short form, whose items are separated by commas."""
    items: object
    try:
        items = json.loads(text)
    except (ValueError, RecursionError):
        items = text[1:-1].split(",")
    if not isinstance(items, list) or any(isinstance(item, (list, dict)) for item in items):
        # This is no list of texts, so the caller checks (and refuses) the text as one value.
        return [text]
    lines = (line.strip() for item in items for line in re.split(r"\r\n|\r|\n", str(item)))
    return [_unquote(line) for line in lines if line and not line.startswith("#")]


def _unquote(line: str) -> str:
    return line[1:-1].strip() if _QUOTED.fullmatch(line) else line


def read_whole(value: object) -> int | None:
    """Return the whole number of an integer or of a text of digits; None for any other value.

    Python's isdecimal also takes digits of other scripts, and int() refuses thousands of digits with a ValueError.
    """
    text = str(value).strip()
    if isinstance(value, bool) or not (text.isascii() and text.isdecimal()) or len(text) > 18:
        return None
    return int(text)


def describe_number(option: str) -> str:
    """Return the description of the valid values of an option that takes a whole number."""
    if option in ("vmid", "vmids"):
        return f"{MIN_VMID} to {MAX_VMID}"
    if option not in RANGES:
        return "a whole number"
    low, high = RANGES[option]
    return f"a whole number from {low} to {high}{_UNITS.get(option, '')}"


def read_vmid(option: str, value: object) -> int:
    """Return the VMID. Raises InvalidInput with the name of the option for a value that is no VMID."""
    vmid = read_whole(value)
    if vmid is None or not MIN_VMID <= vmid <= MAX_VMID:
        raise InvalidInput(
            f"{option}: {show_value(value)} is not a VMID. Valid: {MIN_VMID} to {MAX_VMID}",
            option=option,
            value=value if isinstance(value, int) else None,
        )
    return vmid


def split_words(value: object) -> list[str]:
    """Return the words of a text or a list, for tags and ids.

    The lines are those of split_lines, each split at commas, semicolons and blanks. A comment may end a line.
    """
    lines = (re.split(r"\s#", line, maxsplit=1)[0] for line in split_lines(value))
    return [_unquote(word) for line in lines for word in re.split(r"[\s,;]+", line) if word]


def shorten_size(text: str) -> str:
    """Return a size in Proxmox VE's form: ``20 GB``, ``20g`` and ``20GiB`` are 20G.

    Other texts are returned as they are.
    """
    match = re.fullmatch(r"(\+?[\d.]+) ?([kmgt])(?:i?b)?", text.strip(), re.ASCII | re.IGNORECASE)
    return f"{match[1]}{match[2].upper()}" if match else text


def shorten_ip_config(text: str) -> str:
    """Return ``ipconfigN`` in Proxmox VE's form, without blanks around its commas."""
    return re.sub(r"\s*,\s*", ",", text.strip())


def check_ip_config(option: str, value: str | None) -> None:
    """Raise InvalidInput for an invalid ``ipconfigN``. None is valid.

    Proxmox VE would refuse the value only after the VM was cloned.
    """
    if value is None:
        return
    parts: dict[str, str] = {}
    for part in value.split(","):
        name, sign, text = part.partition("=")
        wrong = f"{part!r} is not one of ip=, gw=, ip6=, gw6="
        if not sign or name not in ("ip", "gw", "ip6", "gw6") or name in parts:
            break
        words = {"ip": ("dhcp",), "ip6": ("dhcp", "auto")}.get(name, ())
        parts[name] = text
        wrong = f"{part!r} is no address{' with its prefix length' if words else ''}"
        if text not in words and not _is_address(text, 6 if name.endswith("6") else 4, prefix=bool(words)):
            break
    else:
        wrong = next(
            (
                f"{gateway!r} needs a fixed address in {name!r}"
                for gateway, name in (("gw", "ip"), ("gw6", "ip6"))
                if gateway in parts and "/" not in parts.get(name, "")
            ),
            "",
        )
    if wrong:
        raise InvalidInput(
            f"{option}: {quote_value(value)} is not valid: {wrong}. Valid: {IPCONFIG[1]}; IPv6 as ip6=auto or "
            "ip6=2001:db8::10/64,gw6=2001:db8::1",
            option=option,
        )


def check_nameserver(option: str, value: str | None) -> None:
    """Raise InvalidInput for a word that is no IP address. None is valid."""
    for word in (value or "").split():
        if not (_is_address(word, 4) or _is_address(word, 6)):
            raise InvalidInput(f"{option}: {quote_value(word)} is no IP address. Valid: {NAMESERVER[1]}", option=option)


def _is_address(text: str, version: int, *, prefix: bool = False) -> bool:
    address, slash, length = text.partition("/")
    try:
        if ipaddress.ip_address(address).version != version or bool(slash) != prefix:
            return False
    except ValueError:
        return False
    # Proxmox VE accepts no shorter prefix.
    return not prefix or (length.isascii() and length.isdecimal() and 8 <= int(length) <= (32 if version == 4 else 128))


def split_tags(value: object) -> list[str]:
    """Return the tags in lower case, as Proxmox VE stores them, each once, in their order."""
    if isinstance(value, dict):
        raise InvalidInput(f"tags: that mapping is not valid. Valid: a list of tags of {TAG[1]}", option="tags")
    tags = list(dict.fromkeys(word.lower() for word in split_words(value)))
    texts = value if isinstance(value, (list, tuple)) else [value]
    if any(isinstance(text, str) and len(text.split("\n")) > 1 for text in texts):
        # A text of several lines may be user data in the wrong option, so the message quotes no part of it.
        for number, tag in enumerate(tags, 1):
            if not fits(tag, TAG):
                raise InvalidInput(f"tags: the tag number {number} is not valid. Valid: {TAG[1]}", option="tags")
    return tags


def split_keys(option: str, value: object) -> list[str]:
    """Return the public keys, one for each line. Raises InvalidInput for a private key, and never quotes that."""
    if isinstance(value, dict):
        raise InvalidInput(f"{option}: that mapping is not valid. Valid: a list of public keys", option=option)
    # A key that was copied from a web page may have a no-break space in place of a blank.
    keys = list(dict.fromkeys(key.replace("\u00a0", " ") for key in split_lines(value)))
    if any("PRIVATE KEY" in key or key.startswith(("-----BEGIN", "PuTTY-User-Key-File")) for key in keys):
        raise InvalidInput(
            f"{option}: holds a private key. Give the public one, the file that ends with .pub, and keep the private "
            "one where it is",
            option=option,
        )
    if any(re.match(r"-+ ?BEGIN SSH2 PUBLIC KEY", key) for key in keys):
        raise InvalidInput(
            f"{option}: holds a key in the format of PuTTY and RFC 4716. Give it in one line, as ssh-keygen -i -f FILE "
            "prints it, or as PuTTYgen shows it for authorized_keys",
            option=option,
        )
    for number, key in enumerate(keys, 1):
        if re.fullmatch(r"(?!AAAA)\S*[/\\]\S*|\S+\.pub", key):
            raise InvalidInput(
                f"{option}: the key number {number} looks like the path of a file or a URL. Give what the file holds, "
                "such as {{ lookup('ansible.builtin.file', '~/.ssh/id_ed25519.pub') }}",
                option=option,
            )
        if len(re.findall(r"(?:ssh-|ecdsa-|sk-)[\w@.-]+[ \t]+AAAA", key)) > 1:
            # sshd would take the second one for the comment of the first.
            raise InvalidInput(
                f"{option}: the line number {number} holds several keys; give each key in a line of its own",
                option=option,
            )
    return keys


def join_words(value: object) -> str:
    """Return a list, or a text with commas, as words separated by one blank.

    That is Proxmox VE's form for name servers and search domains.
    """
    return " ".join(split_words(value))


def quote_value(value: object) -> str:
    """Return a refused value for a message: quoted if it is one short line, else "that value".

    User data or a private key may have got into the wrong option.
    """
    if isinstance(value, (list, tuple, dict)):
        return ("that mapping" if isinstance(value, dict) else "that list") if value else repr(str(value))
    text = str(value)
    return repr(text[:80]) if text.isprintable() else "that value"


def show_value(value: object) -> str:
    """Return a refused value for a message: a whole number as it is, any other value quoted."""
    return str(value) if isinstance(value, int) else quote_value(value)


def is_encodable(text: str) -> bool:
    """Return whether the text can be encoded in UTF-8.

    JSON and YAML can write half of a surrogate pair, which no file, database or terminal accepts.
    """
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def fits(value: object, word: Word) -> bool:
    """Return True if the value matches the pattern.

    Booleans never match: unquoted YAML ``yes`` arrives as True.
    """
    return (
        not isinstance(value, (bool, dict, list))
        and word[0].fullmatch(str(value)) is not None
        and is_encodable(str(value))
    )


def check_value(option: str, value: object, word: Word) -> None:
    """Raise InvalidInput with the name of the option for a value that does not match the pattern. None is valid."""
    if value is not None and not fits(value, word):
        hint = "; YAML read a word such as yes or on, put it in quotes" if isinstance(value, bool) else ""
        if value == "":
            hint = "; leave the option out where there is nothing to say (in a playbook: | default(omit, true))"
        raise InvalidInput(f"{option}: {quote_value(value)} is not valid. Valid: {word[1]}{hint}", option=option)
