"""Encodes elements of nftables sets and maps as the kernel's bytes and as nft's text. Pure."""

import functools
import ipaddress
import socket
import struct
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from userspace_proxy.model.endpoint import family_of
from userspace_proxy.model.names import L4Protocol, ServicePortName
from userspace_proxy.model.service import Portal
from userspace_proxy.netfilter.nft_text import comment
from userspace_proxy.netlink import ip_text

# Set or map name -> key -> value (b"" in a set).
Elements = dict[str, dict[bytes, bytes]]

_PROTOCOLS = {L4Protocol.TCP: socket.IPPROTO_TCP, L4Protocol.UDP: socket.IPPROTO_UDP}


@dataclass(frozen=True, slots=True)
class SetKind:
    """One set or map: the types of its keys and values, ``reason``: its purpose, ``parts``: the meaning of an element.

    ``typeof``: declares types without names by expressions. ``note``: a comment in the kernel.
    """

    key: tuple[str, ...]
    value: tuple[str, ...] = ()
    reason: str = ""
    parts: str = ""
    typeof: str = ""
    is_interval: bool = False
    names_owner: bool = False  # elements carry the service port's name as a comment
    is_shared: bool = False  # several service ports may share an element
    note: str = ""

    @property
    def word(self) -> str:
        return "map" if self.value else "set"

    @property
    def declared(self) -> str:
        """The declaration in nft's syntax."""
        if self.typeof:
            return f"typeof {self.typeof}"
        types = " : ".join(" . ".join(fields) for fields in (self.key, self.value) if fields)
        return f"type {types}{'; flags interval' if self.is_interval else ''}"


# ---- bytes

packed_number = struct.Struct("=I").pack
packed_lone_port = struct.Struct("!H").pack  # as the whole value of a map


def packed_port(port: int) -> bytes:
    return struct.pack("!H2x", port)


def _packed_ip(ip: str) -> bytes:
    return socket.inet_pton(socket.AF_INET if family_of(ip) == 4 else socket.AF_INET6, ip)


packed_ip = functools.lru_cache(100_000)(_packed_ip)  # endpoints are packed again and again


def packed_portal(portal: Portal) -> bytes:
    """Return *portal* as a key: address, protocol and port; a node port's key has no address."""
    port = struct.pack("=B3x", _PROTOCOLS[portal.protocol]) + packed_port(portal.port)
    return port if portal.is_node_port else _packed_ip(portal.ip) + port


def packed_ranges(portal: Portal, networks: Iterable[str]) -> Iterator[tuple[bytes, bytes]]:
    """Yield the elements (*portal*, network) of an interval set; each key is the first followed by the last."""
    key = packed_portal(portal)
    for text in networks:
        network = ipaddress.ip_network(text)
        yield key + network[0].packed + key + network[-1].packed, b""


# ---- text


def shown(kind: SetKind, key: bytes, value: bytes, owner: ServicePortName) -> str:
    """Return an element in nft's syntax, with *owner* in a comment if the set or map *kind* names owners."""
    note = f' comment "{comment(owner)}"' if kind.names_owner else ""
    text = " . ".join(key_fields(kind, key)) + note
    return f"{text} : {' . '.join(fields(kind.value, value))}" if value else text


def key_fields(kind: SetKind, key: bytes) -> list[str]:
    """Return the parts of *key* as nft shows them: in an interval, a network or ``first-last``."""
    if not kind.is_interval:
        return fields(kind.key, key)
    half = len(key) // 2
    first, last = fields(kind.key, key[:half]), fields(kind.key, key[half:])
    return [a if a == b else _range(a, b) for a, b in zip(first, last, strict=True)]


def _range(first: str, last: str) -> str:
    networks = list(ipaddress.summarize_address_range(ipaddress.ip_address(first), ipaddress.ip_address(last)))
    return str(networks[0]) if len(networks) == 1 else f"{first}-{last}"


def fields(types: Iterable[str], packed: bytes) -> list[str]:
    """Return the parts of *packed* as nft shows them."""
    texts, at = [], 0
    for field in types:
        size = 16 if field == "ipv6_addr" else 4
        part = packed[at : at + size]
        at += size
        match field:
            case "ipv4_addr" | "ipv6_addr":
                texts.append(ip_text(part))
            case "inet_proto":
                texts.append({number: str(protocol).lower() for protocol, number in _PROTOCOLS.items()}[part[0]])
            case "inet_service":
                texts.append(str(int.from_bytes(part[:2])))
            case "classid":
                texts.append(class_id(struct.unpack("=I", part)[0]))
            case _:
                texts.append(str(struct.unpack("=I", part)[0]))
    return texts


def class_id(number: int) -> str:
    """Return *number* in the notation of tc and nft for a packet's priority: major:minor."""
    return f"{number >> 16:x}:{number & 0xFFFF:x}"
