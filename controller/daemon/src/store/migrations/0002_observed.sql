-- What was seen of a guest that runs, and what was asked of it.
ALTER TABLE guests ADD COLUMN stands TEXT NOT NULL DEFAULT 'running'
    CHECK (stands IN ('running', 'held', 'suspended', 'stopping'));
ALTER TABLE guests ADD COLUMN resumed_at INTEGER;
-- Moments of the kernel's clock, in nanoseconds.
ALTER TABLE guests ADD COLUMN ends_at INTEGER;
ALTER TABLE guests ADD COLUMN stop_by INTEGER;
ALTER TABLE guests ADD COLUMN public_key TEXT;
ALTER TABLE guests ADD COLUMN handshake INTEGER NOT NULL DEFAULT 0;
