-- What the guest's consumer is known by, NAME:PORT, where it is followed by name; null where its address was given.
ALTER TABLE guests ADD COLUMN consumer_name TEXT;
