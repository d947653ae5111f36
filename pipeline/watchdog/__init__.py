"""The watchdog: a rank that dies, fails or hangs ends the whole job at once, in words.

Each rank keeps one TCP connection to rank 0 from a thread of its own and says once a second what it does. Rank 0 sees
a connection that ends (kill -9, no memory; a node that is lost answers no more, and its connections end after
``LOST_S``) and time in which no rank gets any further; it then names the rank that is the cause and what the others
wait for, in one report, and tells all ranks to stop. They write their Python stacks to ``RUN/logs/rank-N.log`` and
leave with a non-zero exit code from the thread, since the training thread may sit in a collective for ever. Ranks that
lose rank 0 do the same.

Where rank 0 cannot be reached over TCP there is a warning and no watchdog; collectives still end by their own limit.
"""
