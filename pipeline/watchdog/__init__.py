"""The watchdog: when a rank dies, fails or hangs, the whole job ends at once and the cause is named.

A thread of each rank keeps one TCP connection to rank 0 and sends a heartbeat every second: the rank's step and current
activity. Rank 0 detects a connection that ends (kill -9, out of memory; the connections of a lost node end after
``LOST_S``) and a job in which no rank makes progress. It names the rank that is the cause and what the others wait for,
in one report, and tells all ranks to stop. They write their Python stacks to ``RUN/logs/rank-N.log`` and exit with a
non-zero code from that thread, because the training thread may be stuck in a collective.

Rank 0 answers with heartbeats of its own, so the other ranks watch it in turn: when it is silent for longer than
``parallel.timeout_s``, rank 1 (and one rank on every other node) names it, and rank 1 kills it if they share a host.
When rank 0 dies, the other ranks report that in the same way.

If rank 0 cannot be reached over TCP, there is a warning and no watchdog; collectives still time out on their own.
"""
