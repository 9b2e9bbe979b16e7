#!/bin/sh
# Prepares a CI job for tests with vmodel, on Debian or Ubuntu: a virtual environment with vmodel, and what guests are made from.
# ci/action.yml runs this; ci/gitlab.yml has a copy, as GitLab includes nothing but YAML.  From the environment:
#   VMODEL           what pip installs: a checkout, a wheel, or git+https://...
#   VMODEL_KERNELS   kernels of guests, by default stable
#   VMODEL_PACKAGES  what else pip installs, by default pytest pytest-xdist
#   VMODEL_VENV      the virtual environment, by default .vmodel-venv
#   VMODEL_ACCEL     tcg, kvm, or auto: kvm, if a guest boots with it here
# Source it: PATH and VMODEL_ACCEL are for what comes after.
set -eu
: "${VMODEL:?is what pip is to install: a checkout of vmodel, a wheel, or git+https://...}"
: "${VMODEL_KERNELS:=stable}" "${VMODEL_PACKAGES:=pytest pytest-xdist}" "${VMODEL_VENV:=$PWD/.vmodel-venv}"
: "${VMODEL_ACCEL:=auto}"
as_root=
[ "$(id -u)" = 0 ] || as_root="sudo -n"
needed='import ensurepip, glob, os, sysconfig as s
os.stat(s.get_path("include") + "/Python.h") and glob.glob("/usr/share/keyrings/debian-archive-keyring.*")[0]'
if ! { command -v cc && python3 -c "$needed"; } >/dev/null 2>&1; then
    $as_root apt-get update -qq
    $as_root apt-get install -qq -y --no-install-recommends python3-venv python3-dev gcc libc6-dev debian-archive-keyring python-apt-common
fi
python3 -m venv "$VMODEL_VENV"
PATH="$VMODEL_VENV/bin:$PATH"
# shellcheck disable=SC2086 # these are lists
python -m pip install -q --disable-pip-version-check "$VMODEL" $VMODEL_PACKAGES
# shellcheck disable=SC2086
vmodel kernels add $VMODEL_KERNELS
if [ "$VMODEL_ACCEL" = auto ]; then
    VMODEL_ACCEL=tcg
    [ ! -e /dev/kvm ] || [ -w /dev/kvm ] || $as_root chmod a+rw /dev/kvm 2>/dev/null || true
    # In a virtual machine there may be a /dev/kvm with which no guest boots.
    probe="$VMODEL_VENV/share/doc/vmodel/examples/edu.toml"
    if [ -w /dev/kvm ] && VMODEL_ACCEL=kvm vmodel guest "$probe" --timeout 20 -- true >/dev/null 2>&1; then
        VMODEL_ACCEL=kvm
    fi
fi
export PATH VMODEL_ACCEL
set +u
echo "guests: kernels $VMODEL_KERNELS, accelerator $VMODEL_ACCEL"
