"""One module a contender: `pack(source, folder)`, and `opened(job)`, which is entered and gives Opened.

Each is imported in a process, and an environment, of its own; nothing else imports it.
"""
