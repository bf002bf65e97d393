"""names.h for Cython: the states of a connection and the reasons for its end.  A name that is not in the list fails to compile."""

cdef extern from "names.h":
    ctypedef enum tt_state:
        S_FREE "TT_S_free"
        S_NEW "TT_S_new"
        S_WAITING "TT_S_waiting"
        S_OPEN "TT_S_open"
        S_LOGGED_IN "TT_S_logged_in"
        S_CLOSING "TT_S_closing"
        STATES_COUNT "TT_STATES_COUNT"

    ctypedef enum tt_reason:
        R_NOT_PROTOCOL "TT_R_not_protocol"
        R_TAMPERED "TT_R_tampered"
        R_BAD_HELLO "TT_R_bad_hello"
        R_STALLED "TT_R_stalled"
        R_OPERATOR "TT_R_operator"
        R_ADOPTED "TT_R_adopted"
        R_TIMED_OUT "TT_R_timed_out"
        R_SILENT "TT_R_silent"
        R_PEER_CLOSED "TT_R_peer_closed"
        R_BAD_VERSION "TT_R_bad_version"
        R_BAD_PROXY "TT_R_bad_proxy"
        R_TOO_LONG "TT_R_too_long"
        R_TOO_MANY "TT_R_too_many"
        R_IDLE "TT_R_idle"
        R_SLOW_READER "TT_R_slow_reader"
        R_SHUTDOWN "TT_R_shutdown"
        R_INTERNAL "TT_R_internal"
        REASONS_COUNT "TT_REASONS_COUNT"

    struct tt_state_row:
        const char* name
        const char* meaning

    struct tt_reason_row:
        const char* name
        bint times_out
        const char* meaning

    const tt_state_row tt_states[]
    const tt_reason_row tt_reasons[]
