"""Settings of all tests."""

import signal

# A shell that starts the tests in the background has made them, and all they start, ignore Ctrl-C.
signal.signal(signal.SIGINT, signal.default_int_handler)
