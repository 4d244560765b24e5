"""A CA that takes its time, and says when it wants to be asked again, loses no order: openssl is ended only asleep."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from typing import Callable

import pytest

from conftest import Handlers, as_host, binaries, csr_pem
from demo_ca import DemoCA
from proxy import Forward, Proxy, TcpServer
from shared import check_issued, hold

DELAYS = [0, 0.1, 0.22, 0.5, 1, 2, 3, 3.5]  # seconds that each answer takes


@binaries
@pytest.mark.parametrize("check_after", [0, 1, 2, 4, 6])
@pytest.mark.slow
def test_no_order_is_lost(
    check_after: int, openssl: str, ca: DemoCA, handlers: Handlers, tcp_server: TcpServer
) -> None:
    """Orders that wait at a CA that insists on nonces, each CA as slow as it is: after the approval all are issued."""
    hold(ca).check_after = check_after

    def slow(delay: float) -> Callable[[str, Forward], bytes]:
        def spoil(_: str, forward: Forward) -> bytes:
            time.sleep(delay)  # the test is about that very time
            return forward()

        return spoil

    orders = []
    # Where checkAfter is long, openssl gives an answer to a poll 2 seconds (5 before 3.3), whatever we say.
    for number, delay in enumerate(DELAYS if check_after <= 5 else DELAYS[:5]):
        proxy = Proxy(ca, tcp_server)
        proxy.spoil = slow(delay)
        handler = handlers(ca.options(), openssl_bin=openssl, server=proxy.server, msg_timeout="5", total_timeout="10")
        orders.append((handler, csr_pem([f"n{number}.example"])))
    with ThreadPoolExecutor(len(orders)) as pool:
        waiting = list(pool.map(lambda order: order[0].enroll(as_host(order[1])), orders))
        assert [(error, bundle, identifier is None) for error, bundle, _, identifier in waiting] == [
            (None, None, False)
        ] * len(orders)
        ca.approve("all")

        def poll(order: tuple[int, str]) -> object:
            handler, csr = orders[order[0]]
            handler.ask_always = True
            result = handler.poll("name", order[1], as_host(csr))
            assert not result[4], result[0]
            if not result[1]:  # the approval came while it was asked
                result = handler.poll("name", order[1], as_host(csr))
            check_issued(result, csr)
            return result

        list(pool.map(poll, enumerate(str(identifier) for *_, identifier in waiting)))
