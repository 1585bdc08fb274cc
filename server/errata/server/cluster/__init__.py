"""Past one machine, on Ray: work in shards on workers that hold a model, and replicas that answer as the server does.

A Ray cluster is the seam: Ray places processes, restarts them and moves bytes. What a shard computes, and what a
replica answers, is the code that computes and answers it on one machine. Needs the extra `ray`; nothing else imports
this package but commands that were asked for a cluster. docs/cluster.md says how to run it.
"""
