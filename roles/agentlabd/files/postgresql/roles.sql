-- Roles for the records of agentlab on PostgreSQL. Run it as an administrator, once, in the new database:
--   createdb agentlab && sed 's/:DATABASE/agentlab/' roles.sql | psql agentlab
-- Then give both roles a password (\password agentlab) or a client certificate, and a line each in pg_hba.conf:
--   hostssl agentlab agentlab,agentlab_owner 192.0.2.0/24 scram-sha-256

-- Owns the tables: used by `agentlabd --migrate-records` only, at the first installation and after an upgrade.
CREATE ROLE agentlab_owner LOGIN;
-- What controllers run as: it reads and writes rows, and can neither drop nor alter a table.
CREATE ROLE agentlab LOGIN;

REVOKE ALL ON DATABASE :DATABASE FROM PUBLIC;
GRANT CONNECT ON DATABASE :DATABASE TO agentlab, agentlab_owner;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO agentlab_owner;
GRANT USAGE ON SCHEMA public TO agentlab;
ALTER DEFAULT PRIVILEGES FOR ROLE agentlab_owner IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO agentlab;
ALTER DEFAULT PRIVILEGES FOR ROLE agentlab_owner IN SCHEMA public
    GRANT SELECT, USAGE ON SEQUENCES TO agentlab;
