-- Routes for datagrams, with ports of their own.
ALTER TABLE routes DROP CONSTRAINT routes_kind_check;
ALTER TABLE routes ADD CONSTRAINT routes_kind_check CHECK (kind IN ('http', 'tcp', 'udp'));
CREATE UNIQUE INDEX routes_udp ON routes (port) WHERE kind = 'udp' AND deleted_at IS NULL;
