"""Settings of all tests."""

import signal

# A shell that starts the tests in the background, or nohup, has made them ignore these, and all
# that they start.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
