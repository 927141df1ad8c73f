-- Machines that may spawn machines: trees are looked up, and envelopes may end by themselves.
ALTER TABLE instance ADD COLUMN ends_at INTEGER;
CREATE INDEX instance_tree ON instance (tree);
CREATE INDEX instance_parent ON instance (parent) WHERE parent IS NOT NULL;
CREATE INDEX instance_due ON instance (ends_at) WHERE ends_at IS NOT NULL;

-- What was there before may not spawn (absent capabilities are none). A guest's machine gets its
-- guest's limits for an envelope, any other one its own size and nothing more.
UPDATE instance SET
  detail = json_set(detail, '$.envelope', json(coalesce(
    (SELECT json_extract(g.detail, '$.limits') FROM guest g WHERE g.id = instance.guest),
    json_object('cpu_millis', json_extract(spec, '$.cpu_millis'), 'memory_mb', memory_mb,
                'disk_bytes', disk_bytes, 'egress_bytes', 0, 'duration_ms', 0, 'tokens', 0)))),
  ends_at = (SELECT g.expires_at FROM guest g WHERE g.id = instance.guest);
