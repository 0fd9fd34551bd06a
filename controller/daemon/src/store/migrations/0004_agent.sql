-- What the agent in a guest proves its answers with: the next omertad asks the same agent.
ALTER TABLE guests ADD COLUMN agent_key BLOB;
