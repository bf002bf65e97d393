"""The tape catalogue: what is where, who moved it, and the proof.  Knows no sockets, frames or command line."""
