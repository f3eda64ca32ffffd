"""``python -m odysseus_kernels doctor``: what this machine has for the package, what does not work, and what to do.

``facts.py`` says what a rank finds of its process and host, ``self_test.py`` what its operators compute and
``bandwidth.py`` how fast it receives; ``examination.py`` brings the ranks' reports together, and ``problems.py`` says
what follows; ``report.py`` and ``tables.py`` are what is handed out, and ``command.py`` is the command line.
"""
