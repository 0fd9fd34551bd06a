-- The cgroups of a guest, a JSON list of paths: the next omertad may be in another cgroup, and would look elsewhere.
ALTER TABLE guests ADD COLUMN cgroups TEXT;
