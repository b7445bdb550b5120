-- Example of a module file (Lmod): module load sclong_ds
-- Put it at MODULEPATH/sclong_ds/0.1.0.lua, and set root (docs/operate/install-for-a-group.md).
help([[sclong_ds: pretraining of scLong-style models of single cells. Programs: sclong, sclong-prep]])
whatis("Name: sclong_ds")
local root = "/software/sclong_ds/0.1.0"
prepend_path("PATH", pathJoin(root, "bin"))
setenv("SCLONG_VENV", root)
-- Compiled code of each user in a place of the user's own, not in the shared folder.
setenv("SCLONG_SCRATCH", pathJoin(os.getenv("TMPDIR") or "/tmp", "sclong_ds"))
