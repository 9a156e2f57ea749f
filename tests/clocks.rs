//! A wall clock that jumps, as on a device that has just received the time, changes neither interval nor back-off. A loop
//! that does not move while the time passes is unhealthy.

pub mod support {
    pub mod binary;
    pub mod cloud;
    pub mod fleet;
    pub mod odata;
    pub mod recording;
    pub mod sidecar;
    pub mod tools;
}

use std::time::SystemTime;
use std::{fs, thread};

use support::binary;
use support::cloud::{Cloud, Reply, Seen};
use support::fleet::many;
use support::sidecar::{PATIENCE, Sidecar, finish};
use support::tools;

/// A sidecar whose wall clock is off by the content of the file `clock`. Its monotonic clock is right.
fn sidecar(cloud: &Cloud) -> Sidecar {
    let sidecar = binary::sidecar(cloud);
    let (clock, library) = (sidecar.path("clock"), tools::faketime());
    fs::write(&clock, "+0d").unwrap();
    sidecar
        .env("LD_PRELOAD", library.to_str().unwrap())
        .env("FAKETIME_TIMESTAMP_FILE", clock.to_str().unwrap())
        .env("FAKETIME_NO_CACHE", "1")
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "1")
        .env("LOG_LEVEL", "debug")
}

/// Years between this machine's clock and that of a line of the log.
fn off_by(line: &str) -> i64 {
    let time = humantime::parse_rfc3339(line.split(' ').next().unwrap()).unwrap_or_else(|_| panic!("{line}"));
    let seconds = |time: SystemTime| time.duration_since(SystemTime::UNIX_EPOCH).unwrap().as_secs();
    (seconds(time).cast_signed() - seconds(SystemTime::now()).cast_signed()) / (365 * 86400)
}

#[test]
fn the_warning_that_a_list_is_held_back_comes_once_an_hour() {
    let cloud = Cloud::start(many(20));
    // This time the clock that nobody sets jumps as well, so that waits have no length: signals end them.
    let sidecar = sidecar(&cloud).env("FAKETIME_DONT_FAKE_MONOTONIC", "0").env("REFRESH_RATE", "30d");
    let running = sidecar.start();
    running.wait_for("updated balena.json");
    cloud.change(Vec::clear);
    for (warnings, clock) in [(1, "+0s"), (1, "+3500s"), (2, "+3700s"), (2, "+7200s"), (3, "+7400s")] {
        fs::write(sidecar.path("clock"), clock).unwrap();
        for _ in 0..3 {
            let before = cloud.requests().len();
            running.signal("HUP");
            cloud.wait_for_requests(before + 1, PATIENCE);
            running.wait_for_lines("keeps its targets", warnings);
        }
        let lines = running.log().iter().filter(|line| line.contains("keeps its targets")).count();
        assert_eq!(lines, warnings, "at {clock}: {:#?}", running.log());
    }
}

const JUMPS: [(&str, i64); 3] = [("+3660d", 10), ("-3660d", -10), ("+0d", 0)];

#[test]
fn the_interval_is_what_it_was() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud).env("REFRESH_RATE", "2s");
    let running = sidecar.start();
    running.wait_for("updated balena.json");
    let mut refreshes = 1;
    for (jump, years) in JUMPS {
        fs::write(sidecar.path("clock"), jump).unwrap();
        refreshes += 2;
        let line = running.wait_for_lines("balena.json is unchanged", refreshes - 1);
        assert_eq!(off_by(&line), years, "{line}");
    }
    let is_page = |seen: &Seen| seen.target.starts_with("/v7/device?") && !seen.target.ends_with("$top=1");
    let pages: Vec<_> = cloud.requests().into_iter().filter(is_page).collect();
    assert_eq!(pages.len(), refreshes);
    for pair in pages.windows(2) {
        let apart = (pair[1].at - pair[0].at).as_secs_f64();
        // A request may come late. By the clock that jumps it would be no wait, or one of ten years.
        assert!(apart > 1.0, "{apart} s between two refreshes");
    }
}

#[test]
fn the_back_off_is_what_it_was() {
    // A date is measured from that of the answer itself.
    const DATE: &[(&str, &str)] =
        &[("Date", "Sun, 22 Nov 2026 06:59:37 GMT"), ("Retry-After", "Sun, 22 Nov 2026 06:59:43 GMT")];
    let wait_and_jump = |headers: &'static [_], least: f64, (jump, years)| {
        let cloud = Cloud::start(many(20));
        let sidecar = sidecar(&cloud).env("REFRESH_RATE", "4s");
        cloud.intercept(move |_, _| Some(Reply::status(503, headers, b"")));
        let running = sidecar.start();
        let line = running.wait_for("refresh failed");
        assert_eq!(off_by(&line), 0, "{line}");
        // in the midst of the wait
        fs::write(sidecar.path("clock"), jump).unwrap();
        cloud.heal();
        let line = running.wait_for("updated balena.json");
        assert_eq!(off_by(&line), years, "{line}");
        let seen = cloud.requests();
        let apart = (seen[1].at - seen[0].at).as_secs_f64();
        assert!(apart >= least, "{jump}, {headers:?}: {apart} s");
    };
    thread::scope(|scope| {
        for (headers, least) in [(&[][..], 4.0), (&[("Retry-After", "6")], 6.0), (DATE, 6.0)] {
            for jump in JUMPS {
                scope.spawn(move || wait_and_jump(headers, least, jump));
            }
        }
    });
}

/// The monotonic clock runs ahead by two hours, while the loop sleeps by the kernel's own: to the program, the loop hangs.
#[test]
fn a_loop_that_hangs_is_unhealthy_and_still_ends_at_a_signal() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud)
        .env("FAKETIME_DONT_FAKE_MONOTONIC", "0")
        .env("REFRESH_RATE", "1h")
        .env("LISTEN_ADDRESS", "127.0.0.1:0");
    let running = sidecar.start();
    running.wait_for("updated balena.json");
    let line = running.wait_for("status on http://");
    let url = line.split_whitespace().last().unwrap().to_owned();
    let health = || {
        let mut command = sidecar.command();
        command.env_remove("LD_PRELOAD").args(["health", &url]);
        let output = finish(command);
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    assert_eq!(health(), (Some(0), String::new()));
    fs::write(sidecar.path("clock"), "+2h").unwrap();
    let (code, message) = health();
    assert_eq!(code, Some(1), "{message}");
    assert!(message.contains("503") && message.contains("discovery hangs: it is 3"), "{message}");
    running.signal("TERM");
    assert!(running.wait().0.success());
}
