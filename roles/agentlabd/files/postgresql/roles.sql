-- Roles for the records of agentlab on PostgreSQL. Run it as an administrator in the new database, as often as you like:
--   createdb --encoding=UTF8 --locale=C --template=template0 agentlab && psql -v DATABASE=agentlab -f roles.sql agentlab
-- Then give both roles a password (\password agentlab) or a client certificate, and a line in pg_hba.conf:
--   hostssl agentlab agentlab,agentlab_owner 192.0.2.0/24 scram-sha-256
-- The role agentlabd does the same: tasks_from: database.

-- agentlab_owner owns the tables: used by `agentlabd --migrate-records` only, at the first installation and after an
-- upgrade. agentlab is what controllers run as: it reads and writes rows, and can neither drop nor alter a table.
DO $roles$
BEGIN
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'agentlab_owner') THEN
        CREATE ROLE agentlab_owner LOGIN;
    END IF;
    IF NOT EXISTS (SELECT FROM pg_roles WHERE rolname = 'agentlab') THEN
        CREATE ROLE agentlab LOGIN;
    END IF;
END
$roles$;

REVOKE ALL ON DATABASE :DATABASE FROM PUBLIC;
GRANT CONNECT ON DATABASE :DATABASE TO agentlab, agentlab_owner;
REVOKE CREATE ON SCHEMA public FROM PUBLIC;
GRANT USAGE, CREATE ON SCHEMA public TO agentlab_owner;
GRANT USAGE ON SCHEMA public TO agentlab;
ALTER DEFAULT PRIVILEGES FOR ROLE agentlab_owner IN SCHEMA public
    GRANT SELECT, INSERT, UPDATE, DELETE ON TABLES TO agentlab;
ALTER DEFAULT PRIVILEGES FOR ROLE agentlab_owner IN SCHEMA public
    GRANT SELECT, USAGE ON SEQUENCES TO agentlab;
