# Copyright: the agentlab.proxmox contributors
# SPDX-License-Identifier: GPL-3.0-or-later

"""What values may look like: a pattern each, with the words that say what is valid. Creations and profiles are checked by the same ones."""

from __future__ import annotations

import re

from .errors import InvalidInput

Word = tuple[re.Pattern[str], str]

DNS_NAME: Word = (re.compile(r"(?=.{1,63}\Z)[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?(\.[A-Za-z0-9]([A-Za-z0-9-]*[A-Za-z0-9])?)*", re.ASCII),
                  "a DNS name of letters, digits, dots and hyphens, 63 characters at most")
TAG: Word = (re.compile(r"[a-z0-9_][a-z0-9_+.-]*", re.ASCII), "lower-case letters, digits and _ + . -")
SIZE: Word = (re.compile(r"\+?\d{1,7}(\.\d{1,3})?[KMGT]", re.ASCII), "a size such as 20G, or +10G to add to the template's")
IPCONFIG: Word = (re.compile(r"[A-Za-z0-9][A-Za-z0-9.:/=,-]{0,199}", re.ASCII), "such as ip=dhcp or ip=192.0.2.10/24,gw=192.0.2.1")
WORD: Word = (re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}", re.ASCII), "letters, digits, dot, hyphen and underscore")
# Proxmox VE would take a pool named --purge; on a command line (pvesh, pveum) that is an option.
POOL: Word = (re.compile(r"[A-Za-z0-9._][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9._][A-Za-z0-9._-]{0,99}){0,2}", re.ASCII),
              "letters, digits, dot, hyphen and underscore, no hyphen first, nested by /")
NAMESERVER: Word = (re.compile(r"[0-9A-Fa-f.: ]{2,200}"), "IP addresses separated by blanks")
SEARCHDOMAIN: Word = (re.compile(r"[A-Za-z0-9][A-Za-z0-9. -]{0,252}", re.ASCII), "a domain such as example.org")
USER: Word = (re.compile(r"[a-z_][a-z0-9_-]{0,31}", re.ASCII), "a user name of lower-case letters, digits, hyphen and underscore")
FIREWALL_GROUP: Word = (re.compile(r"[A-Za-z][A-Za-z0-9_-]{1,17}", re.ASCII), "the name of a security group, 2 to 18 letters, digits, - and _")
PUBLIC_KEY: Word = (re.compile(r"(ssh-|ecdsa-|sk-)\S+ \S[^\n]*"), "a public key in one line (type, key, comment)")
# The models of network card that Proxmox VE offers for new VMs.
MODELS = ("virtio", "e1000", "e1000e", "rtl8139", "vmxnet3")


def quoted(value: object) -> str:
    """A refused value as an error quotes it: one short line, or not at all. User data or a private key may have got into the wrong place."""
    if isinstance(value, (list, tuple, dict)):
        return ("that mapping" if isinstance(value, dict) else "that list") if value else repr(str(value))
    text = str(value)
    return repr(text[:80]) if text.isprintable() else "that value"


def encodable(text: str) -> bool:
    """Whether UTF-8 can hold it: JSON and YAML can write half of a surrogate pair, which no file, database or terminal takes."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def fits(value: object, word: Word) -> bool:
    """Whether it looks like that. What YAML made of a yes is no word."""
    return not isinstance(value, (bool, dict, list)) and word[0].fullmatch(str(value)) is not None and encodable(str(value))


def match(option: str, value: object, word: Word) -> None:
    """InvalidInput, by the name of the option, for a value that does not look like that; None is not looked at."""
    if value is not None and not fits(value, word):
        hint = "; YAML read a word such as yes or on, put it in quotes" if isinstance(value, bool) else ""
        raise InvalidInput(f"{option}: {quoted(value)} is not valid. Valid: {word[1]}{hint}", option=option)
