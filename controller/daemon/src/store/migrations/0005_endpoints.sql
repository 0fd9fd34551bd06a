-- Where the guest's consumer is, was, or is about to be: a JSON list, latest first, written before the guard follows. Which
-- of them is in force is the guard's to say. Null where the consumer never moved.
ALTER TABLE guests ADD COLUMN endpoints TEXT;
