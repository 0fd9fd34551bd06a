-- One row a guest: written before the first thing is made for it, gone when the last is proven gone. What
-- a guest holds of the host (name, address, memory, processors, user) is what its row says, and nothing else.
CREATE TABLE guests (
    id INTEGER PRIMARY KEY AUTOINCREMENT,
    name TEXT NOT NULL UNIQUE,
    -- What was asked for, as the API's request, with what the daemon filled in.
    request TEXT NOT NULL,
    -- Its addresses are the four that begin with four times this number.
    slot INTEGER NOT NULL UNIQUE,
    accel TEXT NOT NULL,
    machine TEXT NOT NULL,
    run_dir TEXT NOT NULL,
    -- Numbers of processes, interfaces and programs mean something in one boot alone.
    boot TEXT NOT NULL,
    step TEXT NOT NULL CHECK (step IN ('admitted', 'launching', 'launched', 'guarded', 'running', 'ending')),
    uid INTEGER,
    pid INTEGER,
    pid_start INTEGER,
    tap INTEGER,
    guard_egress INTEGER,
    guard_ingress INTEGER
) STRICT;
