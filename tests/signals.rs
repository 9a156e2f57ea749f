//! SIGTERM and SIGINT end it within a second, whatever it is doing, and leave the list as it was; SIGHUP makes it refresh.

pub mod support {
    pub mod binary;
    pub mod cloud;
    pub mod fleet;
    pub mod moments;
    pub mod odata;
    pub mod recording;
    pub mod rules;
    pub mod sidecar;
}

use std::io::Write;
use std::net::{Ipv4Addr, SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt;
use std::os::unix::net::{SocketAddr as UnixAddress, UnixDatagram};
use std::process::Command;
use std::time::{Duration, Instant};
use std::{fs, io, thread};

use nix::time::{ClockId, clock_gettime};
use socket2::{Domain, Socket, Type};
use support::binary::sidecar;
use support::cloud::{Cloud, KEY, Reply, Seen, Step};
use support::fleet::many;
use support::moments::{Moments, moment, unfinished};
use support::sidecar::{PATIENCE, Running, Sidecar};

/// Ends it by both signals, each time in a run of its own that `reach` has brought into the state.
fn ends(mut reach: impl FnMut() -> (Sidecar, Running)) {
    for signal in ["TERM", "INT"] {
        let mut took = Vec::new();
        // What is busy may be this machine: once in time shows that nothing holds it up. The many tries are for that machine.
        while took.last().is_none_or(|took| *took >= Duration::from_secs(1)) {
            assert!(took.len() < 10, "SIG{signal}: {took:?}");
            let (sidecar, running) = reach();
            let list = fs::read(sidecar.path("balena.json")).ok();
            let start = Instant::now();
            running.signal(signal);
            let (status, log) = running.wait();
            took.push(start.elapsed());
            assert_eq!(status.code(), Some(0), "SIG{signal}: {status}\n{}", log.join("\n"));
            assert!(log.iter().any(|line| line.ends_with(&format!("stopped by SIG{signal}"))), "{log:#?}");
            assert_eq!(fs::read(sidecar.path("balena.json")).ok(), list);
        }
    }
}

fn is_page(seen: &Seen) -> bool {
    seen.target.starts_with("/v7/device?") && !seen.target.ends_with("&$top=1")
}

/// Waits until a page of devices is asked for. The releases come before.
fn wait_for_page(cloud: &Cloud) {
    while !cloud.requests().iter().any(is_page) {
        cloud.wait_for_requests(cloud.requests().len() + 1, PATIENCE);
    }
}

/// A list stands there; then every page is answered so.
fn stuck(steps: impl Fn(&[u8]) -> Vec<Step> + Clone + Send + 'static) -> impl FnMut() -> (Sidecar, Running) {
    let mut clouds = Vec::new();
    move || {
        let cloud = Cloud::start(many(20));
        let sidecar = sidecar(&cloud);
        sidecar.oneshot();
        cloud.clear_requests();
        let steps = steps.clone();
        cloud.intercept(move |seen, due| is_page(seen).then(|| Reply::steps(steps(due))));
        let running = sidecar.start();
        wait_for_page(&cloud);
        clouds.push(cloud);
        (sidecar, running)
    }
}

#[test]
fn a_signal_ends_it_while_it_waits() {
    let cloud = Cloud::start(many(20));
    ends(|| {
        let sidecar = sidecar(&cloud).env("REFRESH_RATE", "1h");
        let running = sidecar.start();
        running.wait_for("updated balena.json");
        (sidecar, running)
    });
}

#[test]
fn a_signal_ends_it_while_it_connects() {
    // A listener whose queue is full does not answer: the next connections are never made.
    let listener = Socket::new(Domain::IPV4, Type::STREAM, None).unwrap();
    listener.bind(&SocketAddr::from((Ipv4Addr::LOCALHOST, 0)).into()).unwrap();
    listener.listen(0).unwrap();
    let addr = listener.local_addr().unwrap().as_socket().unwrap();
    let mut queue = Vec::new();
    let full = loop {
        match TcpStream::connect_timeout(&addr, Duration::from_millis(300)) {
            Ok(stream) => queue.push(stream),
            Err(error) => break error,
        }
    };
    assert_eq!(full.kind(), io::ErrorKind::TimedOut);
    let cloud = Cloud::start(many(20));
    ends(|| {
        let sidecar = sidecar(&cloud);
        sidecar.oneshot();
        let sidecar = sidecar.env("BALENA_API_URL", format!("http://{addr}"));
        let running = sidecar.start();
        running.wait_for(&format!("devices of http://{addr}"));
        wait_for("a connection under way", || connecting(running.id(), addr));
        (sidecar, running)
    });
}

/// Whether the process has a connection to there that is not made yet: one of its sockets is in the state SYN-SENT.
fn connecting(id: u32, to: SocketAddr) -> bool {
    let sockets = fs::read_dir(format!("/proc/{id}/fd")).unwrap().flatten();
    let sockets: Vec<_> = sockets.filter_map(|fd| fs::read_link(fd.path()).ok()).collect();
    let (port, table) = (format!(":{:04X}", to.port()), fs::read_to_string(format!("/proc/{id}/net/tcp")).unwrap());
    table.lines().map(|line| line.split_whitespace().collect::<Vec<_>>()).any(|columns| {
        let is_ours = || sockets.iter().any(|link| link.to_str() == Some(&format!("socket:[{}]", columns[9])));
        columns[2].ends_with(&port) && columns[3] == "02" && is_ours()
    })
}

fn wait_for(what: &str, mut is_so: impl FnMut() -> bool) {
    let deadline = Instant::now() + PATIENCE;
    while !is_so() {
        assert!(Instant::now() < deadline, "never {what}");
        thread::yield_now();
    }
}

#[test]
fn a_signal_ends_it_while_it_waits_for_an_answer() {
    ends(stuck(|_| vec![Step::Hang]));
}

#[test]
fn a_signal_ends_it_in_the_midst_of_a_body() {
    ends(stuck(|due| vec![Step::Send(due[..due.len() - 100].to_vec()), Step::Hang]));
}

#[test]
fn a_signal_ends_it_while_a_body_drips() {
    ends(stuck(|due| {
        due.iter().flat_map(|byte| [Step::Send(vec![*byte]), Step::Pause(Duration::from_millis(20))]).collect()
    }));
}

#[test]
fn a_signal_ends_it_while_it_backs_off() {
    for header in [None, Some(("Retry-After", "3600"))] {
        let cloud = Cloud::start(many(20));
        ends(|| {
            cloud.heal();
            let sidecar = sidecar(&cloud).env("REFRESH_RATE", "1h");
            sidecar.oneshot();
            cloud.intercept(move |_, _| Some(Reply::status(429, header.as_slice(), b"")));
            let running = sidecar.start();
            let line = running.wait_for("refresh failed");
            assert_eq!(line.contains("next try in 1h"), header.is_some(), "{line}");
            (sidecar, running)
        });
    }
}

#[test]
fn a_signal_in_the_midst_of_a_write_leaves_one_list_or_the_other() {
    for signal in ["TERM", "INT"] {
        let cloud = Cloud::start(Vec::new());
        let moments = Moments::of(&cloud, 5000);
        let sidecar = sidecar(&cloud);
        sidecar.oneshot();
        let (file, scratch) = (sidecar.path("balena.json"), sidecar.path(".balena.json.tmp"));
        let running = sidecar.start();
        moments.drive(Some(&running));
        // It is held as soon as a new list is under way, until the signal is there too.
        let before = loop {
            wait_for("a write", || !unfinished(&scratch).is_empty());
            running.signal("STOP");
            wait_for("a halt", || stopped(running.id()));
            if !unfinished(&scratch).is_empty() {
                break moment(&fs::read(&file).unwrap()).unwrap();
            }
            running.signal("CONT"); // too late
        };
        moments.drive(None);
        running.signal(signal);
        running.signal("CONT");
        let (status, log) = running.wait();
        assert_eq!(status.code(), Some(0), "{log:#?}");
        let after = moment(&fs::read(&file).unwrap()).unwrap();
        assert!(after >= before);
        sidecar.oneshot();
        assert_eq!(unfinished(&scratch), [""; 0]);
    }
}

fn stopped(id: u32) -> bool {
    let tasks = fs::read_dir(format!("/proc/{id}/task")).unwrap().flatten();
    tasks.map(|task| fs::read_to_string(task.path().join("stat")).unwrap_or_default()).all(|stat| {
        let state = stat.rsplit_once(") ").map(|(_, rest)| rest.starts_with('T'));
        state.unwrap_or(true) // that one has ended
    })
}

#[test]
fn sighup_refreshes_at_once() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud).env("REFRESH_RATE", "1h");
    let running = sidecar.start();
    running.wait_for("updated balena.json: 20 targets");
    // while it waits
    for count in 1..=5 {
        cloud.change(|devices| drop(devices.pop()));
        running.signal("HUP");
        running.wait_for(&format!("updated balena.json: {} targets", 20 - count));
    }
    // while it backs off, for however long
    for retry_after in ["1800", "3600"] {
        cloud.intercept(move |_, _| Some(Reply::status(429, &[("Retry-After", retry_after)], b"")));
        running.signal("HUP");
        let waits = if retry_after == "1800" { "30m" } else { "1h" };
        running.wait_for(&format!("next try in {waits}"));
    }
    cloud.heal();
    cloud.change(|devices| drop(devices.pop()));
    running.signal("HUP");
    running.wait_for("updated balena.json: 14 targets");
}

/// The key comes by a pipe, for which the start waits.
#[test]
fn sighup_does_not_end_a_start() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud).env("API_KEY_FILE", "pipe").env("API_KEY", "");
    assert!(Command::new("mkfifo").arg(sidecar.path("pipe")).status().expect("mkfifo").success());
    let running = sidecar.start();
    let pipe = fs::OpenOptions::new().write(true).open(sidecar.path("pipe")); // it opens once the program reads
    running.signal("HUP");
    pipe.expect("a pipe").write_all(KEY.as_bytes()).expect("a reader");
    running.wait_for("updated balena.json: 20 targets");
}

/// The API has limited the requests for the state of the devices, and not those for the list.
#[test]
fn sighup_asks_for_the_state_of_the_devices_at_once() {
    let cloud = Cloud::start(many(20));
    cloud.intercept(|seen, _| {
        let limits = Reply::status(429, &[("Retry-After", "3600")], b"");
        seen.target.contains("heartbeat").then_some(limits)
    });
    let running = sidecar(&cloud).env("LISTEN_ADDRESS", "127.0.0.1:0").env("DEVICE_REFRESH_RATE", "1h").start();
    running.wait_for("cannot renew the state of the devices");
    cloud.heal();
    running.signal("HUP");
    running.wait_for("the state of the devices can be renewed again");
}

#[test]
fn sighup_in_the_midst_of_a_refresh_is_not_lost() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud).env("REFRESH_RATE", "1h");
    cloud.intercept(|seen, due| is_page(seen).then(|| Reply::steps([Step::Pause(PATIENCE), Step::Send(due.to_vec())])));
    let running = sidecar.start();
    wait_for_page(&cloud);
    running.signal("HUP");
    // The answer on its way is the old one.
    cloud.change(|devices| drop(devices.pop()));
    wait_for("a signal that has come", || !pending(running.id()));
    cloud.heal();
    running.wait_for("updated balena.json: 20 targets");
    running.wait_for("updated balena.json: 19 targets");
    assert_eq!(cloud.requests().iter().filter(|seen| is_page(seen)).count(), 2);
}

/// Those that come during a refresh ask for the same refresh.
#[test]
fn twelve_sighups_in_the_midst_of_a_refresh_are_one() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud).env("REFRESH_RATE", "1h");
    let path = sidecar.path("notify");
    let socket = UnixDatagram::bind(&path).unwrap();
    let sidecar = sidecar.env("NOTIFY_SOCKET", path.to_str().unwrap());
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    cloud.intercept(|seen, due| is_page(seen).then(|| Reply::steps([Step::Pause(PATIENCE), Step::Send(due.to_vec())])));
    let running = sidecar.start();
    wait_for_page(&cloud);
    for _ in 0..12 {
        running.signal("HUP");
        let mut buffer = [0; 4096];
        while !buffer.starts_with(b"RELOADING=1") {
            socket.recv(&mut buffer).expect("a notification");
        }
    }
    cloud.change(|devices| drop(devices.pop()));
    cloud.heal();
    running.wait_for("updated balena.json: 19 targets");
    cloud.change(|devices| drop(devices.pop()));
    running.signal("HUP");
    running.wait_for("updated balena.json: 18 targets");
    assert_eq!(cloud.requests().iter().filter(|seen| is_page(seen)).count(), 3);
}

/// Whether a signal waits to be taken.
fn pending(id: u32) -> bool {
    let status = fs::read_to_string(format!("/proc/{id}/status")).unwrap();
    let line = status.lines().find_map(|line| line.strip_prefix("ShdPnd:")).unwrap();
    line.trim().bytes().any(|digit| digit != b'0')
}

/// In some containers the socket of the service manager is no file, but a name.
#[test]
fn the_socket_of_the_service_manager_may_be_in_the_abstract_namespace() {
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let name = sidecar.path("notify").to_str().unwrap().to_owned();
    let socket = UnixDatagram::bind_addr(&UnixAddress::from_abstract_name(&name).unwrap()).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let _running = sidecar.env("NOTIFY_SOCKET", format!("@{name}")).start();
    let mut buffer = [0; 4096];
    let length = socket.recv(&mut buffer).expect("a notification");
    assert_eq!(&buffer[..length], b"READY=1");
}

/// systemd takes a reload as failed if this time is before that of the signal.
#[test]
fn systemd_learns_when_a_reload_began() {
    let now = || Duration::from(clock_gettime(ClockId::CLOCK_MONOTONIC).unwrap());
    let cloud = Cloud::start(many(20));
    let sidecar = sidecar(&cloud);
    let socket = UnixDatagram::bind(sidecar.path("notify")).unwrap();
    socket.set_read_timeout(Some(PATIENCE)).unwrap();
    let path = sidecar.path("notify").to_str().unwrap().to_owned();
    let sidecar = sidecar.env("NOTIFY_SOCKET", path);
    let running = sidecar.start();
    running.wait_for("updated balena.json");
    let before = now();
    running.signal("HUP");
    let mut buffer = [0; 4096];
    let began = loop {
        let length = socket.recv(&mut buffer).expect("a notification");
        let text = String::from_utf8_lossy(&buffer[..length]);
        let micros = text.lines().find_map(|line| line.strip_prefix("MONOTONIC_USEC="));
        if let Some(micros) = micros {
            break Duration::from_micros(micros.parse().unwrap());
        }
    };
    assert!(before <= began && began <= now(), "{before:?} {began:?}");
}
