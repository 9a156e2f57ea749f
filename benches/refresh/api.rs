//! A fleet of any size behind the simulated API, in a separate process, so that its cost is not counted. Each answer is that of the
//! strict simulation, made the first time that it is asked for and then kept.
//!
//! Each line on its standard input is a moment of the fleet. It answers with the traffic since the line before.

use std::collections::HashMap;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::ops::RangeInclusive;
use std::process::{Child, ChildStdin, ChildStdout, Command, Stdio};
use std::sync::{Arc, Condvar, Mutex};
use std::time::{Duration, SystemTime};
use std::{env, fs, thread};

use rustls::{ServerConnection, StreamOwned};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use crate::support::cloud::{Cloud, IDLE, Seen, read_request, recorded_devices};
use crate::support::fleet::{install, sibling};
use crate::support::tls::Authority;

/// Minutes between two reports of a device's supervisor.
const REPORTS: u64 = 5;
/// Minutes that a device without a connection stays so.
const OUTAGE: u64 = 5;
/// Only requests for the state of the devices ask for this field.
const STATE: &str = "api_heartbeat_state";

/// Requests for the services that do not run.
const NOT_RUNNING: &str = "/v7/image_install?";

/// A state of the fleet.
#[derive(Clone, Copy, Debug, Default, Deserialize, Eq, Hash, PartialEq, Serialize)]
pub enum Moment {
    /// The beginning.
    #[default]
    First,
    /// One device in a hundred, on every page, has another name.
    Other,
    /// A minute of an hour. In an hour, 1% of the devices get another name, 1% lose their connection for some minutes, and all
    /// report their memory, storage, CPU and temperature every few minutes.
    Minute(u64),
}

/// What was asked of the API, and what it sent, heads included.
#[derive(Default, Deserialize, Serialize)]
pub struct Traffic {
    /// The targets of the requests for devices.
    pub pages: Vec<String>,
    /// All requests.
    pub requests: usize,
    pub sent: usize,
    /// When the last answer was sent.
    pub last: Option<SystemTime>,
    /// Connections that are open now.
    pub open: usize,
    /// Connections that were opened.
    pub opened: usize,
    /// Bytes that came in and went out, TLS included.
    pub wire: [usize; 2],
}

impl Traffic {
    /// Adds what came later.
    pub fn add(&mut self, later: Traffic) {
        self.pages.extend(later.pages);
        (self.sent, self.opened) = (self.sent + later.sent, self.opened + later.opened);
        self.requests += later.requests;
        self.wire = [self.wire[0] + later.wire[0], self.wire[1] + later.wire[1]];
        (self.last, self.open) = (later.last.or(self.last), later.open);
    }

    /// The requests of discovery. A signal asks for the state of the devices as well.
    pub fn of_discovery(self) -> Vec<String> {
        self.pages.into_iter().filter(|page| page.contains("device_name")).collect()
    }

    /// Requests of discovery, and for the state of the devices.
    pub fn pages_of_each(&self) -> [usize; 2] {
        ["device_name", STATE].map(|field| self.pages.iter().filter(|page| page.contains(field)).count())
    }
}

/// The process of the API. It ends when its standard input closes.
pub struct Api {
    child: Child,
    moments: ChildStdin,
    answers: BufReader<ChildStdout>,
    pub url: String,
    /// Holds the certificate of its authority.
    folder: tempfile::TempDir,
}

impl Api {
    /// Over plain HTTP.
    pub fn start(devices: u64) -> Self {
        Self::with(devices, IDLE, "http")
    }

    /// Over TLS. It closes idle connections this many times sooner than the real API, and answers requests for the state of the
    /// devices once in a moment.
    pub fn fast(devices: u64, times: u32) -> Self {
        Self::with(devices, IDLE / times, "https")
    }

    fn with(devices: u64, idle: Duration, scheme: &str) -> Self {
        let folder = tempfile::tempdir().expect("a temporary folder");
        let mut command = Command::new(env::current_exe().expect("the path of this program"));
        command.args(["api", &devices.to_string(), &idle.as_millis().to_string(), scheme]).current_dir(&folder);
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn().expect("this program runs");
        let moments = child.stdin.take().expect("a pipe");
        let answers = BufReader::new(child.stdout.take().expect("a pipe"));
        let mut api = Api { child, moments, answers, url: String::new(), folder };
        api.url = format!("{scheme}://{}", api.read());
        api
    }

    /// The certificate of its authority, if it speaks TLS.
    pub fn authority(&self) -> std::path::PathBuf {
        self.folder.path().join(AUTHORITY)
    }

    /// Sets the state of the fleet, and returns the traffic since it was set last.
    pub fn set(&mut self, moment: Moment) -> Traffic {
        writeln!(self.moments, "{}", serde_json::to_string(&moment).expect("JSON")).expect("the API lives");
        serde_json::from_str(&self.read()).expect("JSON")
    }

    fn read(&mut self) -> String {
        let mut line = String::new();
        self.answers.read_line(&mut line).expect("the API lives");
        line.trim_end().to_owned()
    }
}

impl Drop for Api {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

/// Version of the content, target, and the headers that matter.
type Asked = (u64, String, Option<String>, Option<String>);

/// The file with the certificate of the authority.
const AUTHORITY: &str = "ca.pem";

struct Server {
    devices: u64,
    idle: Duration,
    tls: Option<Arc<rustls::ServerConfig>>,
    patterns: Vec<Value>,
    cloud: Cloud,
    moment: Mutex<Moment>,
    /// A moment has begun.
    begun: Condvar,
    /// The last moment whose state of the devices was asked for.
    stated: Mutex<Option<Moment>>,
    traffic: Mutex<Traffic>,
    answers: Mutex<HashMap<Asked, Arc<Vec<u8>>>>,
}

/// The API itself: serves until standard input ends.
pub fn serve(args: &[String]) {
    let number = |at: usize| args[at].parse().expect("a number");
    let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
    let tls = (args[2] == "https").then(|| {
        let authority = Authority::generate();
        fs::write(AUTHORITY, authority.pem()).expect("it can be written");
        let mut config = (*authority.server(&["127.0.0.1"])).clone();
        config.alpn_protocols = vec![b"http/1.1".into()];
        Arc::new(config)
    });
    let server = Arc::new(Server {
        devices: number(0),
        idle: Duration::from_millis(number(1)),
        tls,
        patterns: recorded_devices(),
        cloud: Cloud::start(Vec::new()),
        moment: Mutex::default(),
        begun: Condvar::new(),
        stated: Mutex::default(),
        traffic: Mutex::default(),
        answers: Mutex::default(),
    });
    println!("{}", listener.local_addr().expect("an address"));
    let accepting = server.clone();
    thread::spawn(move || {
        for stream in listener.incoming().flatten() {
            let server = accepting.clone();
            thread::spawn(move || {
                let mut traffic = server.traffic.lock().unwrap();
                (traffic.open, traffic.opened) = (traffic.open + 1, traffic.opened + 1);
                drop(traffic);
                let _ = server.open(stream); // an error is the end of a connection
                server.traffic.lock().unwrap().open -= 1;
            });
        }
    });
    for line in io::stdin().lines().map_while(Result::ok) {
        *server.moment.lock().unwrap() = serde_json::from_str(&line).expect("a moment");
        server.begun.notify_all();
        let mut traffic = server.traffic.lock().unwrap();
        println!("{}", serde_json::to_string(&*traffic).expect("JSON"));
        *traffic = Traffic { open: traffic.open, ..Traffic::default() };
    }
}

/// A socket whose bytes count.
struct Counted(TcpStream, Arc<Server>);

impl Read for Counted {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        let count = self.0.read(into)?;
        self.1.traffic.lock().unwrap().wire[0] += count;
        Ok(count)
    }
}

impl Write for Counted {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        let count = self.0.write(bytes)?;
        self.1.traffic.lock().unwrap().wire[1] += count;
        Ok(count)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.0.flush()
    }
}

impl Server {
    fn open(self: &Arc<Self>, stream: TcpStream) -> io::Result<()> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IDLE))?;
        let socket = stream.try_clone()?;
        let stream = Counted(stream, self.clone());
        match &self.tls {
            None => self.talk(stream, &socket),
            Some(tls) => {
                let session = ServerConnection::new(tls.clone()).map_err(io::Error::other)?;
                self.talk(StreamOwned::new(session, stream), &socket)
            }
        }
    }

    fn talk(&self, mut stream: impl Read + Write, socket: &TcpStream) -> io::Result<()> {
        let mut unread = Vec::new();
        while let Some(seen) = read_request(&mut stream, &mut unread)? {
            self.hold(&seen);
            let answer = self.answer(&seen);
            stream.write_all(&answer)?;
            stream.flush()?;
            socket.set_read_timeout(Some(self.idle))?; // from now on it is idle
            let mut traffic = self.traffic.lock().unwrap();
            (traffic.requests, traffic.sent) = (traffic.requests + 1, traffic.sent + answer.len());
            traffic.last = Some(SystemTime::now());
            if seen.target.starts_with("/v7/device") {
                traffic.pages.push(seen.target);
            }
        }
        Ok(())
    }

    /// Lets a request for the state of the devices wait until a minute begins in which it was not answered yet.
    fn hold(&self, seen: &Seen) {
        if !seen.target.contains(STATE) || !seen.target.contains("(id%20gt%200)") {
            return;
        }
        let mut stated = self.stated.lock().unwrap();
        let known = |moment: &mut Moment| matches!(*moment, Moment::Minute(_)) && Some(*moment) == *stated;
        let moment = *self.begun.wait_while(self.moment.lock().unwrap(), known).unwrap();
        *stated = Some(moment);
    }

    fn answer(&self, seen: &Seen) -> Arc<Vec<u8>> {
        let (moment, header) = (*self.moment.lock().unwrap(), |name| seen.header(name).map(str::to_owned));
        let asked = |version, etag| (version, seen.target.clone(), header("accept-encoding"), etag);
        let version = self.version(&seen.target, moment);
        let mut answers = self.answers.lock().unwrap();
        // An answer that has changed is the same whatever the client knows.
        let full = answers.entry(asked(version, None)).or_insert_with(|| {
            let headers = seen.headers.iter().filter(|(name, _)| name != "if-none-match").cloned().collect();
            self.make(&Seen { headers, ..seen.clone() }, moment).into()
        });
        let head = String::from_utf8_lossy(&full[..full.len().min(1024)]);
        match header("if-none-match").filter(|etag| head.contains(&format!("ETag: {etag}\r\n"))) {
            None => full.clone(),
            Some(etag) => answers.entry(asked(0, Some(etag))).or_insert_with(|| self.make(seen, moment).into()).clone(),
        }
    }

    /// The devices of a page.
    fn ids(&self, target: &str) -> RangeInclusive<u64> {
        let number = |before| target.split_once(before)?.1.split([')', '&']).next()?.parse().ok();
        let (after, top): (u64, u64) = (number("(id%20gt%20").unwrap_or(0), number("$top=").unwrap_or(0));
        after + 1..=self.devices.min(after + top)
    }

    /// A number that differs between moments in which the content of this target differs.
    fn version(&self, target: &str, moment: Moment) -> u64 {
        let ids = if target.starts_with(NOT_RUNNING) { 1..=self.devices } else { self.ids(target) };
        let count = |is: &dyn Fn(u64) -> bool| ids.clone().filter(|id| is(*id)).count() as u64;
        let outages = |minute: u64, of: fn(u64) -> Option<u64>| {
            let begun = count(&|id| of(id).is_some_and(|at| at <= minute));
            begun * 1000 + count(&|id| of(id).is_some_and(|at| at + OUTAGE <= minute))
        };
        match moment {
            Moment::First => u64::MAX,
            Moment::Other => u64::MAX - 1,
            Moment::Minute(minute) if target.contains("memory_usage") => minute,
            Moment::Minute(minute) if target.contains("image_install") => outages(minute, stopped),
            Moment::Minute(minute) if target.contains(STATE) => outages(minute, lost),
            Moment::Minute(_) => count(&|id| is_renamed(id, moment)),
        }
    }

    fn make(&self, seen: &Seen, moment: Moment) -> Vec<u8> {
        let page = if seen.target.starts_with(NOT_RUNNING) {
            self.stopped(moment).map(|id| self.device(id, moment)).collect()
        } else {
            self.ids(&seen.target).map(|id| self.device(id, moment)).collect()
        };
        self.cloud.change(|devices| *devices = page);
        self.cloud.answer(seen)
    }

    /// The devices with a service that does not run.
    fn stopped(&self, moment: Moment) -> impl Iterator<Item = u64> {
        (1..=self.devices).filter(move |id| is_stopped(*id, moment))
    }

    /// Like one of the recorded devices but for its identity, its name and what it reports.
    fn device(&self, id: u64, moment: Moment) -> Value {
        let pattern = &self.patterns[usize::try_from(id).expect("an id") % self.patterns.len()];
        let name = pattern["device_name"].as_str().expect("a name");
        let mut device = sibling(pattern, id, &format!("{name} {id}"));
        if is_renamed(id, moment) {
            device["device_name"] = json!(format!("{name} {id} B"));
        }
        device["image_install"] = json!([]);
        if let Some(release) = device["is_running__release"][0]["id"].as_u64() {
            for (number, service) in (1..).zip(["app", "db", "node-exporter"]) {
                let status = if number == 1 && is_stopped(id, moment) { "exited" } else { "Running" };
                install(&mut device, release, number, service, status, None);
            }
        }
        if let Moment::Minute(minute) = moment {
            report(&mut device, id, minute);
        }
        device
    }
}

fn is_renamed(id: u64, moment: Moment) -> bool {
    id % 100 == 50
        && match moment {
            Moment::First => false,
            Moment::Other => true,
            Moment::Minute(minute) => chance(id, 1) % 60 <= minute,
        }
}

/// Whether a service of a device does not run: of one device in a hundred all the time, and of another one for some minutes.
fn is_stopped(id: u64, moment: Moment) -> bool {
    let Moment::Minute(minute) = moment else { return id % 100 == 75 };
    id % 100 == 75 || stopped(id).is_some_and(|at| (at..at + OUTAGE).contains(&minute))
}

/// The minute in which a service of a device ends.
fn stopped(id: u64) -> Option<u64> {
    (id % 100 == 76).then(|| chance(id, 11) % 60)
}

/// The minute in which a device loses its connection.
fn lost(id: u64) -> Option<u64> {
    (id % 100 == 25).then(|| chance(id, 2) % 60)
}

/// What the API knows of a device's state in a minute.
fn report(device: &mut Value, id: u64, minute: u64) {
    const WEEK: u64 = 7 * 24 * 3600 * 1000;
    let began = |at: u64| NOON + at * 60_000 + chance(id, 3) % 60_000;
    let (is_online, since) = match lost(id) {
        Some(lost) if minute >= lost + OUTAGE => (true, began(lost + OUTAGE)),
        Some(lost) if minute >= lost => (false, began(lost)),
        _ => (true, NOON - chance(id, 4) % WEEK),
    };
    let since = SystemTime::UNIX_EPOCH + Duration::from_millis(since);
    device["is_connected_to_vpn"] = json!(is_online);
    device["api_heartbeat_state"] = json!(if is_online { "online" } else { "offline" });
    device["last_vpn_event"] = json!(humantime::format_rfc3339_millis(since).to_string());
    // The report that is the last one in this minute.
    let report = (minute + REPORTS - id % REPORTS) / REPORTS;
    let (memory, storage) = ([923, 1848, 3792, 7830], [13_568, 28_100, 116_200]);
    let pick = |of: &[u64], salt| of[usize::try_from(chance(id, salt)).expect("small") % of.len()];
    let (memory, storage) = (pick(&memory, 5), pick(&storage, 6));
    device["memory_total"] = json!(memory);
    device["memory_usage"] = json!(memory / 5 + chance(id, 7) % (memory / 2) + chance(id, 100 + report) % 40);
    device["storage_total"] = json!(storage);
    device["storage_usage"] = json!(storage / 10 + chance(id, 8) % (storage / 2) + report % 3);
    device["cpu_usage"] = json!(chance(id, 200 + report) % 40);
    device["cpu_temp"] = json!(42 + chance(id, 9) % 15 + chance(id, 300 + report) % 5);
    device["is_undervolted"] = json!(chance(id, 10).is_multiple_of(50));
}

/// 2026-11-22 12:00 UTC, in milliseconds since 1970.
const NOON: u64 = 1_795_348_800_000;

/// A number that looks random, and depends on these two only.
fn chance(id: u64, salt: u64) -> u64 {
    // SplitMix64
    let mut mixed = id.wrapping_mul(0x9e37_79b9_7f4a_7c15).wrapping_add(salt.wrapping_mul(0xd1b5_4a32_d192_ed03));
    mixed = (mixed ^ (mixed >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    mixed = (mixed ^ (mixed >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    (mixed ^ (mixed >> 31)) >> 16
}
