"""Decide which addresses a request may have the worker fetch. Pure.

It judges the IP address that a connection goes to; names and spellings only lead there. The caller resolves the name, asks
`AddressRules.admits` about each IP address, and connects to no other.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network, ip_address, ip_network
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from httpx2 import URL

Address = IPv4Address | IPv6Address

# Global in Python's tables (of some versions), but not the internet: protocol assignments, among them the port control and
# relay servers of the local network and Oracle's metadata; the 6to4 relay; Azure's host, which answers every machine there.
_NEVER_V4: Final = tuple(map(IPv4Network, ("192.0.0.0/24", "192.88.99.0/24", "168.63.129.16/32")))
# Protocol assignments with Teredo, documentation, 6to4: a tunnel hides the address that is reached in the end.
_NEVER_V6: Final = tuple(map(IPv6Network, ("2001::/23", "2001:db8::/32", "2002::/16", "3fff::/20")))
_GLOBAL_V6: Final = IPv6Network("2000::/3")
# The prefix under which a network without IPv4 reaches the IPv4 internet: its name servers return it every day.
_NAT64: Final = IPv6Network("64:ff9b::/96")

_HOST: Final = re.compile(r"[a-z0-9._-]+|[0-9a-f:.]+")
_PORTS: Final = range(1, 1 << 16)
_NUMBER: Final = re.compile(r"[0-9]+|0x[0-9a-f]*")


@dataclass(frozen=True, slots=True)
class AddressRules:
    """The addresses that the operator allows. A host may be `example.com`, or `.example.com` for it and all its subdomains."""

    hosts: tuple[str, ...] | None = None
    """The only hosts that may be named. None allows every public one, an empty list none."""
    private: tuple[str, ...] = ()
    """Hosts, addresses and networks (`10.1.0.0/16`) that may be reached although they are not public."""

    def refusal(self, url: URL) -> str | None:
        """Return why this address may not even be looked up, as the end of a sentence, or None."""
        host = bare_host(url)
        if self.hosts == ():
            return "requests to this endpoint may name no addresses (INPUT_URL_HOSTS): send the file itself as base64"
        if url.scheme not in {"http", "https"}:
            return "an address must begin with http:// or https://"
        if url.userinfo:
            return "an address must hold no user name or password: use a signed address, or send the file itself"
        if not _HOST.fullmatch(host) or (url.port is not None and url.port not in _PORTS):
            return "it has no valid host or port"
        if self.hosts is not None and not _is_one_of(host, self.hosts):
            return "the operator lets requests name other hosts only (INPUT_URL_HOSTS)"
        return self._refusal_of_number(host)

    def _refusal_of_number(self, host: str) -> str | None:
        if parse_address(host) is not None:
            return None if self.admits(host, host) else PRIVATE
        # As in browsers: a host whose last part is a number is an address. Resolvers read 127.1, 0x7f000001 and 2130706433 as
        # one, and nobody writes those in good faith.
        if ":" in host or _NUMBER.fullmatch(host.rpartition(".")[2]):
            return "an IP address must be written in the usual form"
        return None

    def admits(self, host: str, address: str) -> bool:
        """Return whether a connection may go to `address`, to which `host` was resolved."""
        parsed = parse_address(address)
        return parsed is not None and (is_public(parsed) or self.excepts(host, parsed))

    def excepts(self, host: str, address: Address) -> bool:
        """Return whether the operator's exceptions name this host or this address."""
        if _is_one_of(host.lower().removesuffix("."), self.private):
            return True
        numbers = {address, embedded_ipv4(address) or address}
        return any(number in network for network in _networks(self.private) for number in numbers)


PRIVATE: Final = (
    "it leads into a private or reserved network, which requests must not reach; "
    "the operator can allow a host with INPUT_URL_ALLOW_PRIVATE"
)


def bare_host(url: URL) -> str:
    """Return the host of an address in lower case, without the dot that ends a full name."""
    return url.raw_host.decode("ascii").lower().removesuffix(".")


def parse_address(text: str) -> Address | None:
    """Return the IP address that a text is in the usual form, or None."""
    try:
        return ip_address(text)
    except ValueError:
        return None


def embedded_ipv4(address: Address) -> IPv4Address | None:
    """Return the IPv4 address that this IPv6 address really reaches: mapped, or through the well-known NAT64 prefix."""
    if isinstance(address, IPv4Address):
        return None
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    return address.ipv4_mapped


def is_public(address: Address) -> bool:
    """Return whether the IP address is that of one machine on the internet, and leads to no private network by a detour.

    Stricter than `is_global`, which also accepts multicast and a few local services, differently in each version of Python.
    """
    inner = embedded_ipv4(address)
    if inner is not None:
        return is_public(inner)
    if isinstance(address, IPv4Address):
        return address.is_global and not address.is_multicast and not any(address in network for network in _NEVER_V4)
    return address in _GLOBAL_V6 and address.is_global and not any(address in network for network in _NEVER_V6)


def _is_one_of(host: str, entries: Sequence[str]) -> bool:
    return any(host == entry.removeprefix(".") or (entry.startswith(".") and host.endswith(entry)) for entry in entries)


def _networks(entries: Sequence[str]) -> Iterator[IPv4Network | IPv6Network]:
    for entry in entries:
        try:
            yield ip_network(entry, strict=False)
        except ValueError:
            continue
