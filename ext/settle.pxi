# Settling: what a negative status asks for is mapped, waited for or made room for, or becomes an exception.

cdef int settle(Log log, int status, Trouble *t) except -1:
    """Does what a negative status asks for, so that the caller can try again; raises what it cannot mend."""
    try:
        ask_owner(log, log.asked(), status, t)
        return 0
    except OSError as problem:
        if log.closed:          # by another thread, meanwhile
            raise ClosedError("the store is closed") from None
        if not isinstance(problem, Error):
            raise Error(problem.errno, f"cannot read the store: {problem.strerror}") from problem
        raise


cdef int ask_owner(Log log, owner, int status, Trouble *t) except -1:
    if status == UNMAPPED:
        if not owner._map_location(t.place, t.known) and t.indexes == atomic_load(&log.indexes):
            if t.doubted == t.place + 1:
                raise_damage(log, t)
            t.doubted = t.place + 1
    elif status == DAMAGED:
        raise_damage(log, t)
    elif status == LOOK_CLOSER:
        while atomic_load(&log.attention):
            log.check_open()
            owner._await_turn()
    elif status == OUTDATED:
        owner._index_changed()
        log.check_open()
    elif status == REFUSED:
        check_writable(log)
    elif status == NEED_LOG_ROOM:
        owner._make_room(t.place)
    elif status == CANNOT_WRITE:
        raise_unwritable(t.status)
    elif status == UNCHECKED:
        if not check_shard(log, t.place):
            owner._index_damaged(f"the shard at page {t.place} fails its checksum")
    elif status == INDEX_GREW:
        if not owner._index_grew(t.known):
            owner._index_damaged(f"the directory names page {t.place} of {t.known}")
    elif status == NEED_PAGES:
        owner._index_pages(t.place)
    elif status == NO_MEMORY:
        raise MemoryError()
    elif status == NOT_A_PUT:
        path, number, offset = owner._place_of(t.place)
        raise CorruptionError("the index points at a record that is not a put", path=path, segment=number, offset=offset,
                              expected="a put", found="another kind")
    return 0


cdef int raise_unwritable(int problem) except -1:
    raise Error(problem, f"cannot write to the store: {os.strerror(problem)}")


cdef int raise_damage(Log log, Trouble *t) except -1:
    path, number, offset = log.asked()._place_of(t.place)
    reason = SCAN_REASONS.get(t.status, "unreadable")
    if t.status in (RECORD_BAD_CRC, RECORD_BAD_VALUE):
        expected, found = f"crc32c {t.expected:08x}", f"{t.found:08x}"
    elif t.status == RECORD_UNKNOWN:
        raise FormatError(f"{path} has a record at {offset} of a kind that only newer versions of LogKV know")
    else:
        expected, found = "a record", {"end": "zeros", "truncated": "less than a record"}.get(reason, reason)
    raise CorruptionError(f"record damaged ({reason})", path=path, segment=number, offset=offset, expected=expected,
                          found=found)
