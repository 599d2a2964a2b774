import socket

import pytest

from tune.runtime.cluster import connect


def test_an_address_without_a_cluster_is_refused_at_once() -> None:
    with socket.socket() as bound:
        bound.bind(("127.0.0.1", 0))
        for scheme in ("", "ray://"):
            with pytest.raises(ConnectionError, match="no Ray cluster answers"):
                connect(f"{scheme}127.0.0.1:{bound.getsockname()[1]}")
    for address in ("http://127.0.0.1:8265", "head", "head:port"):
        with pytest.raises(ValueError, match="must be auto, HOST:PORT or ray://HOST:PORT"):
            connect(address)
