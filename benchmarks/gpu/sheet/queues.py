"""Throughput of a closed queueing network, by mean value analysis."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Station:
    """A station at which customers queue.

    Attributes:
        time: how long a customer occupies a server per round.
        servers: the number of servers; each customer always uses the same one.
        varies: the squared coefficient of variation of the time.
    """

    time: float
    servers: int = 1
    varies: float = 0.0


def rounds(customers: int, elsewhere: float, stations: list[Station]) -> float:
    """The rounds that all customers together complete per unit of time.

    In each round a customer spends the time `elsewhere`, without waiting, and visits every station once. On arrival it
    finds, on average, the queue of a network with one customer less, so the number of customers is raised one by one.
    For a customer already in service, it waits only for the residual time.

    Reiser and Lavenberg, Mean-value analysis of closed multichain queuing networks, 1980; the term for the residual
    time is from Reiser, A queueing network analysis of computer communication networks, 1979.
    """
    limit = min(station.servers / station.time for station in stations if station.time)
    queues = [0.0] * len(stations)
    used = [0.0] * len(stations)
    rate = 0.0
    for count in range(1, customers + 1):
        spent = [
            station.time * (1 + queue - use * (1 - station.varies) / 2)
            for station, queue, use in zip(stations, queues, used, strict=True)
        ]
        rate = min(limit, count / (elsewhere + sum(spent)))
        queues = [rate * time / station.servers for time, station in zip(spent, stations, strict=True)]
        used = [rate * station.time / station.servers for station in stations]
    return rate
