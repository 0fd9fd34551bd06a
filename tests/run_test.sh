#!/usr/bin/env bash
# Tests tests/run.sh: a cargo of our own prints what a runner would. Ends in `runner: N checks passed, N failed`.
set -euo pipefail
cd "$(dirname "$0")/.."

directory=$(mktemp -d)
trap 'rm -rf "$directory"' EXIT
export OMERTA_FAKE=$directory/fake
cat >"$directory/cargo" <<'END'
#!/bin/sh
case $1:$2 in
nextest:--version) [ ! -e "$OMERTA_FAKE/no-nextest" ] ;;
nextest:run) cat "$OMERTA_FAKE/nextest"; exit "$(cat "$OMERTA_FAKE/status")" ;;
*) cat "$OMERTA_FAKE/cargo-test" ;;
esac
END
chmod +x "$directory/cargo"
passed=0 failed=0

# given NEXTEST-OUTPUT STATUS CARGO-TEST-OUTPUT: what the runners will print
given() {
    rm -rf "$OMERTA_FAKE"
    mkdir "$OMERTA_FAKE"
    printf '%s\n' "$1" >"$OMERTA_FAKE/nextest"
    echo "$2" >"$OMERTA_FAKE/status"
    printf '%s\n' "$3" >"$OMERTA_FAKE/cargo-test"
}

# expect NAME CI STATUS PATTERN: run.sh with CI set so ends with the status and says a line that matches
expect() {
    local status=0 said
    # A filter, so that neither guests nor machines are started.
    said=$(PATH=$directory:$PATH CI=$2 tests/run.sh anything 2>&1) || status=$?
    if [ "$status" = "$3" ] && grep -qE "$4" <<<"$said"; then
        passed=$((passed + 1))
    else
        failed=$((failed + 1))
        printf 'runner: %s: exit %s, wanted %s and /%s/ in:\n%s\n' "$1" "$status" "$3" "$4" "$said"
    fi
}

readonly DOC='test result: ok. 1 passed; 0 failed; 0 ignored'
readonly ACCEPTED="skipped: this distribution's kernel version cannot be disguised"

given '     Summary [   1.0s] 2 tests run: 2 passed, 0 skipped' 0 "$DOC"
expect "all pass" true 0 '^test: 3 passed, 0 failed, 0 skipped$'

given '        PASS [   0.1s] (1/2) a one
  stdout ───
    skipped: needs a tap
    skipped: and a guest
        PASS [   0.1s] (2/2) a two
    skipped: needs a tap
     Summary [   1.0s] 3 tests run: 3 passed, 0 skipped' 0 "$DOC"
expect "a test is skipped once, whatever it prints" '' 0 '^test: 2 passed, 0 failed, 2 skipped$'
expect "a skip that is on no list fails where CI is set" true 1 'may not be skipped here: needs a tap$'
expect "CI=false is no CI" false 0 '2 skipped$'

given "        PASS [   0.1s] (1/2) a one
    $ACCEPTED
     Summary [   1.0s] 2 tests run: 2 passed, 0 skipped" 0 "$DOC"
expect "a skip on the list passes" true 0 '^test: 2 passed, 0 failed, 1 skipped$'

given '        FAIL [   0.1s] (1/2) a one
    skipped: needs a tap
     Summary [   1.0s] 2 tests run: 1 passed, 1 failed, 0 skipped' 100 "$DOC"
expect "a test that failed was not skipped" '' 1 '^test: 2 passed, 1 failed, 0 skipped$'

given '' 101 "$DOC"
expect "a build that breaks fails the run" '' 1 'a phase failed before or after its tests'

given '     Summary [   1.0s] 1 test run: 1 passed, 0 skipped' 0 ''
touch "$OMERTA_FAKE/no-nextest"
expect "nothing ran" '' 1 'no test ran'

given '' 0 'successes:

---- one stdout ----
skipped: needs a tap
skipped: needs a tap

---- two stdout ----
skipped: needs a tap

test result: ok. 3 passed; 0 failed; 0 ignored'
touch "$OMERTA_FAKE/no-nextest"
expect "cargo test alone: skipped tests" '' 0 '^test: 1 passed, 0 failed, 2 skipped$'

echo "runner: $passed checks passed, $failed failed"
[ "$failed" = 0 ]
