"""How much gets done where many want the same few things: a closed network of queues, by mean value analysis."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Station:
    """What customers queue for.

    Attributes:
        time: for which a customer occupies a server in one round.
        servers: each customer is served by one of them, always the same.
        varies: how much the time varies: the squared coefficient of variation.
    """

    time: float
    servers: int = 1
    varies: float = 0.0


def rounds(customers: int, elsewhere: float, stations: list[Station]) -> float:
    """How many rounds all customers together make in a unit of time.

    In a round a customer spends the time `elsewhere`, with nobody in its way, and visits every station once. It finds
    there, on average, what it would find if it were not itself one of the customers: so the number of customers is
    raised one by one. Of whom it finds being served, only the rest of the time is to be waited for.

    Reiser and Lavenberg, Mean-value analysis of closed multichain queuing networks, 1980; the term of the rest is that
    of Reiser, A queueing network analysis of computer communication networks, 1979.
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
