//! Two sidecars on one file by mistake: the second says so and ends, and the first goes on unharmed.

use std::{fs, thread};

use crate::support::binary::sidecar;
use crate::support::cloud::Cloud;
use crate::support::fleet::many;
use crate::support::sidecar::{Running, finish};

#[test]
fn the_second_on_a_file_says_so_and_ends() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let running = sidecar.start();
    running.wait_for("updated balena.json: 20 targets");
    // under whatever name
    fs::create_dir(sidecar.path("sub")).unwrap();
    std::os::unix::fs::symlink(sidecar.dir.path(), sidecar.path("link")).unwrap();
    let whole = sidecar.path("balena.json").display().to_string();
    // as if a write were under way
    let unfinished = sidecar.path(".balena.json.tmp/new-abc123");
    fs::write(&unfinished, "[").unwrap();
    let all = [&[][..], &["--oneshot"], &["--sd-file", &whole], &["--sd-file", "sub/../link/balena.json"]];
    // All at once, since each waits for the first to end.
    let seconds = all.map(|words| {
        let mut second = sidecar.command();
        second.args(words);
        (words, thread::spawn(move || finish(second)))
    });
    for (words, output) in seconds {
        let output = output.join().unwrap();
        let log = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(2), "{words:?}: {log}");
        assert!(log.contains("balena.json: another baletheus writes it; stop the other one, or"), "{words:?}: {log}");
        assert_eq!(fs::read(&unfinished).unwrap(), b"[", "the second cleaned up under the first's hands");
    }
    cloud.change(|devices| drop(devices.pop()));
    running.wait_for("updated balena.json: 19 targets");
    assert_eq!(running.log().iter().filter(|line| line.contains("WARN") || line.contains("ERROR")).count(), 0);
}

/// At an update, the container before it may still be about to end.
#[test]
fn the_second_starts_when_the_first_ends_within_a_moment() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let first = sidecar.start();
    first.wait_for("updated balena.json: 20 targets");
    let before = cloud.requests().len();
    let second = sidecar.start();
    first.signal("TERM");
    second.wait_for("balena.json is up to date: 20 targets");
    assert!(cloud.requests().len() > before);
}

#[test]
fn a_signal_ends_the_second_while_it_waits() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let first = sidecar.start();
    first.wait_for("updated balena.json: 20 targets");
    for (words, code) in [(&[][..], 0), (&["--oneshot"], 1)] {
        let mut second = sidecar.command();
        second.args(words);
        let second = Running::spawn(second);
        second.wait_for("another baletheus writes balena.json: waiting 30s at most for its end");
        second.signal("TERM");
        let (status, log) = second.wait();
        assert_eq!(status.code(), Some(code), "{words:?}: {log:#?}");
        assert!(!log.iter().any(|line| line.contains("ERROR")), "{words:?}: {log:#?}");
    }
}

#[test]
fn one_that_was_killed_bars_nobody() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    for _ in 0..3 {
        let running = sidecar.start();
        running.wait_for("balena.json");
        running.wait_for("20 targets");
        running.signal("KILL");
        let (status, _) = running.wait();
        assert_eq!(status.code(), None);
    }
    sidecar.oneshot();
}

#[test]
fn a_dry_run_beside_it_and_two_files_in_one_directory_are_no_mistake() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let first = sidecar.start();
    first.wait_for("updated balena.json: 20 targets");
    let mut dry = sidecar.command();
    dry.arg("--dry-run");
    let output = finish(dry);
    assert_eq!(output.status.code(), Some(0));
    assert_eq!(String::from_utf8(output.stdout).unwrap(), sidecar.list());
    let other = sidecar.args(["--sd-file", "other.json"]);
    let second = other.start();
    second.wait_for("updated other.json: 20 targets");
    cloud.change(|devices| drop(devices.pop()));
    first.wait_for("updated balena.json: 19 targets");
    second.wait_for("updated other.json: 19 targets");
    assert_eq!(other.list(), fs::read_to_string(other.path("other.json")).unwrap());
}

/// A sidecar whose folder was removed has a lock that others do not see. Two of them must not write by turns.
#[test]
fn a_folder_that_was_removed_does_not_let_two_of_them_write() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let first = sidecar.start();
    first.wait_for("updated balena.json: 20 targets");
    fs::remove_dir_all(sidecar.path(".balena.json.tmp")).unwrap();
    let second = sidecar.start();
    second.wait_for("balena.json is up to date: 20 targets");
    cloud.change(|devices| drop(devices.pop()));
    second.wait_for("updated balena.json: 19 targets");
    // It may find that the file is as it should be; what it must not do is write.
    cloud.change(|devices| drop(devices.pop()));
    second.wait_for("updated balena.json: 18 targets");
    assert!(!first.log().iter().any(|line| line.contains("updated balena.json: 1")), "{:#?}", first.log());
    // With the second halted, the first is alone to miss the file, and does not make it.
    second.signal("STOP");
    let told = first.log().iter().filter(|line| line.contains("refresh failed")).count();
    fs::remove_file(sidecar.path("balena.json")).unwrap();
    first.signal("HUP");
    let line = first.wait_for_lines("refresh failed", told + 1);
    assert!(line.contains("balena.json: another baletheus writes it; stop the other one, or"), "{line}");
    assert!(!sidecar.path("balena.json").exists());
    second.signal("CONT");
    second.wait_for_lines("updated balena.json: 18 targets", 2);
}
