//! A simulated balenaCloud: what a real open-balena-api 49.0.12 answered when it was recorded, over any devices.
//! `tests/it/recordings.rs` holds it against the recordings. Plain sockets and a thread a connection, so that a test has every
//! byte and every pause of an answer in its hands.

use super::odata::{self, Refused, Resource};
use super::recording::Recording;
use base64::prelude::{BASE64_STANDARD, Engine};
use flate2::{Compression, write::GzEncoder};
use serde_json::{Value, json};
use sha1::{Digest, Sha1};
use std::collections::{BTreeMap, HashMap, HashSet};
use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::{Arc, Condvar, Mutex, MutexGuard};
use std::thread::{self, JoinHandle};
use std::time::{Duration, Instant};

/// The named API key that a new cloud accepts.
pub const KEY: &str = "simulated-named-key-9f41c07ab2d85e63";

/// An idle connection is closed after this time.
pub const IDLE: Duration = Duration::from_secs(5);

/// Longer targets are refused; the real limit lies between 15,000 and 17,000 bytes.
const LONGEST_TARGET: usize = 16_000;

/// Smaller bodies are not compressed.
const LEAST_COMPRESSED: usize = 1024;

static DEVICE: Resource = Resource {
    // As in the recording `v7-no-select`, without the references whose ids the other recordings do not tell.
    fields: "created_at modified_at id api_heartbeat_state changed_api_heartbeat_state_on__date uuid local_id device_name \
        note belongs_to__application is_online last_connectivity_event is_connected_to_vpn last_vpn_event \
        is_locked_until__date public_address ip_address mac_address is_web_accessible memory_usage memory_total \
        storage_block_device storage_usage storage_total cpu_usage cpu_temp is_undervolted cpu_id download_progress status \
        os_version os_variant overall_status overall_progress supervisor_version provisioning_progress \
        provisioning_state api_port api_secret update_status last_update_status_event",
    links: &[
        ("is_of__device_type", &DEVICE_TYPE),
        ("belongs_to__application", &APPLICATION),
        ("is_running__release", &RELEASE),
        ("should_be_running__release", &RELEASE),
        ("is_pinned_on__release", &RELEASE),
        ("should_be_operated_by__release", &RELEASE),
        ("should_be_managed_by__release", &RELEASE),
        ("device_tag", &TAG),
        ("image_install", &IMAGE_INSTALL),
    ],
    users_only: false,
};
static APPLICATION: Resource = Resource {
    fields: "id app_name slug",
    links: &[("organization", &ORGANIZATION), ("application_tag", &TAG)],
    users_only: false,
};
// The recorded answer to a device's key is 401 as soon as this one is expanded; its permissions lack no other.
static ORGANIZATION: Resource = Resource { fields: "handle", links: &[], users_only: true };
static DEVICE_TYPE: Resource = Resource { fields: "slug", links: &[], users_only: false };
static RELEASE: Resource = Resource {
    fields: "id commit semver raw_version release_version belongs_to__application",
    links: &[
        ("belongs_to__application", &APPLICATION),
        ("is_running_on__device", &DEVICE),
        ("release_image", &RELEASE_IMAGE),
    ],
    users_only: false,
};
static RELEASE_IMAGE: Resource =
    Resource { fields: "id", links: &[("image", &IMAGE), ("image_label", &LABEL)], users_only: false };
static IMAGE: Resource =
    Resource { fields: "id is_a_build_of__service", links: &[("is_a_build_of__service", &SERVICE)], users_only: false };
/// What a device has of a service. Each device has its own, as `image_install`.
static IMAGE_INSTALL: Resource = Resource {
    fields: "id device installs__image is_provided_by__release status download_progress install_date created_at modified_at",
    links: &[("device", &DEVICE), ("installs__image", &IMAGE), ("is_provided_by__release", &RELEASE)],
    users_only: false,
};
static SERVICE: Resource =
    Resource { fields: "id service_name", links: &[("service_label", &LABEL)], users_only: false };
static LABEL: Resource = Resource { fields: "label_name value", links: &[], users_only: false };
static TAG: Resource = Resource { fields: "tag_key value", links: &[], users_only: false };

/// The devices of the recordings, each with all that any of them tells about it.
pub fn recorded_devices() -> Vec<Value> {
    let devices = |name| {
        let body = Recording::read(name).answer.body;
        match serde_json::from_slice::<Value>(&body).expect("JSON")["d"].take() {
            Value::Array(devices) => devices,
            other => panic!("no list of devices: {other}"),
        }
    };
    let mut merged = devices("v7-discovery");
    for more in [devices("v7-full"), devices("v7-device-metrics")].into_iter().flatten() {
        let device = merged.iter_mut().find(|device| device["id"] == more["id"]);
        merge(device.expect("a device of v7-discovery"), more);
    }
    for device in &mut merged {
        for reference in ["is_running__release", "should_be_running__release"] {
            for release in device[reference].as_array_mut().into_iter().flatten() {
                release["id"] = release_id(release["commit"].as_str().expect("a commit")).into();
            }
        }
    }
    merged
}

/// The devices of the recordings in `services/`, each with its installs.
pub fn recorded_services() -> Vec<Value> {
    let rows = |name: &str| {
        let body = Recording::read(&format!("services/{name}")).answer.body;
        let list = serde_json::from_slice::<Value>(&body).expect("JSON")["d"].take();
        list.as_array().expect("a list").clone()
    };
    let mut devices = rows("state-more");
    for more in [rows("state-pinned"), rows("host-and-supervisor")].into_iter().flatten() {
        let device = devices.iter_mut().find(|device| device["id"] == more["id"]);
        merge(device.expect("a device of state-more"), more);
    }
    let supervisors = json!([{ "id": 2, "app_name": "supervisor", "slug": "balena_os/supervisor" }]);
    let fleet = json!([{ "id": 1, "app_name": "pumps", "slug": "acme/pumps", "organization": [{ "handle": "acme" }],
        "application_tag": [] }]);
    let mut installs = rows("all-rows-of-the-fleet");
    for dated in rows("not-running-with-dates") {
        let row = installs.iter_mut().find(|row| row["id"] == dated["id"]);
        merge(row.expect("a row of the fleet"), dated);
    }
    for row in &mut installs {
        let service = &mut row["installs__image"][0]["is_a_build_of__service"][0];
        let id = ["app", "db", "node-exporter", "balena-supervisor"]
            .iter()
            .position(|name| service["service_name"] == *name);
        service["id"] = json!(id.expect("a known service") + 1);
        let is_supervisor = service["service_name"] == "balena-supervisor";
        row["is_provided_by__release"][0]["belongs_to__application"] =
            if is_supervisor { supervisors.clone() } else { fleet.clone() };
    }
    for device in &mut devices {
        let own = installs.iter().filter(|row| row["device"]["__id"] == device["id"]);
        device["image_install"] = own.cloned().collect();
        // Nothing tells the rest.
        device["uuid"] = json!(format!("{:032x}", device["id"].as_u64().expect("an id")));
        device["belongs_to__application"] = fleet.clone();
        (device["device_tag"], device["is_of__device_type"]) = (json!([]), json!([{ "slug": "raspberrypi4-64" }]));
    }
    devices
}

/// The recordings do not tell the ids of releases: each commit has one of its own.
pub fn release_id(commit: &str) -> u64 {
    u64::from_str_radix(&commit[..6], 16).expect("a commit of hex digits")
}

/// The image of a service of a release, by the service's number in [`Cloud::set_services`].
pub fn image_id(release: u64, number: u64) -> u64 {
    release * 1000 + number + 1
}

/// Adds what is missing. What is there stays, with the order of its tags.
fn merge(into: &mut Value, more: Value) {
    match (into, more) {
        (Value::Object(into), Value::Object(more)) => {
            for (name, value) in more {
                merge(into.entry(name).or_insert_with(|| value.clone()), value);
            }
        }
        (Value::Array(into), Value::Array(more)) if into.len() == 1 && more.len() == 1 => {
            merge(&mut into[0], more.into_iter().next().unwrap_or_default());
        }
        _ => {}
    }
}

/// A request that came, and what was answered.
#[derive(Clone, Debug)]
pub struct Seen {
    pub method: String,
    /// Path and query, raw.
    pub target: String,
    /// With lower-case names.
    pub headers: Vec<(String, String)>,
    pub at: Instant,
    /// 0 until it is answered, and when the answer has no status line.
    pub status: u16,
    /// Bytes after the head of the answer, chunks and compression included.
    pub body: usize,
}

impl Seen {
    pub fn header(&self, name: &str) -> Option<&str> {
        let header = self.headers.iter().find(|(other, _)| other == name);
        header.map(|(_, value)| value.as_str())
    }

    fn closes(&self) -> bool {
        let asked = self.header("connection");
        self.target.len() > LONGEST_TARGET || asked.is_some_and(|value| value.eq_ignore_ascii_case("close"))
    }

    fn takes_gzip(&self) -> bool {
        let codings = self.header("accept-encoding").unwrap_or_default().split(',');
        codings.map(str::trim).any(|coding| coding == "gzip")
    }

    fn has(&self, etag: &str) -> bool {
        let known = self.header("if-none-match").unwrap_or_default().split(',');
        known.map(str::trim).any(|known| known == etag)
    }
}

/// What an interceptor says instead of the real answer.
pub struct Reply(Vec<Step>);

#[derive(Clone, Debug)]
pub enum Step {
    Send(Vec<u8>),
    /// Ends early when the cloud heals or is dropped.
    Pause(Duration),
    /// Until the cloud heals or is dropped, or the client goes away. What the client sends later is not read.
    Hang,
    Close,
    /// Ends the connection with an RST.
    Reset,
}

impl Reply {
    /// A whole answer; `Content-Length` is added.
    pub fn status(status: u16, headers: &[(&str, &str)], body: &[u8]) -> Self {
        let mut head = status_line(status);
        for (name, value) in headers {
            head += &format!("{name}: {value}\r\n");
        }
        head += &format!("Content-Length: {}\r\n\r\n", body.len());
        Self::steps([Step::Send([head.as_bytes(), body].concat())])
    }

    pub fn steps(steps: impl IntoIterator<Item = Step>) -> Self {
        Self(steps.into_iter().collect())
    }

    /// The status and the length of the body.
    fn measure(&self) -> (u16, usize) {
        let sent = || {
            self.0.iter().filter_map(|step| match step {
                Step::Send(bytes) => Some(bytes),
                _ => None,
            })
        };
        let head: Vec<u8> = sent().flatten().copied().take(16 * 1024).collect();
        let status = head.get(9..12).and_then(|digits| str::from_utf8(digits).ok()?.parse().ok());
        let end = head.windows(4).position(|bytes| bytes == b"\r\n\r\n");
        let all: usize = sent().map(Vec::len).sum();
        (status.unwrap_or(0), end.map_or(0, |end| all - end - 4))
    }
}

type Interceptor = Box<dyn FnMut(&Seen, &[u8]) -> Option<Reply> + Send>;

struct Shared {
    devices: Mutex<Vec<Value>>,
    /// The images of each release, with the labels of their services.
    services: Mutex<HashMap<u64, Vec<Value>>>,
    keys: Mutex<Keys>,
    /// The most records of an answer.
    limit: Mutex<usize>,
    /// What the named key may not read: `image_install` is 401, and `service`, `image` and `release` are empty.
    denied: Mutex<Option<&'static str>>,
    requests: Mutex<Vec<Seen>>,
    came: Condvar,
    interceptor: Mutex<Option<Interceptor>>,
    wires: Mutex<Wires>,
    healed: Condvar,
}

struct Keys {
    named: String,
    /// Each with the id of its device.
    devices: HashMap<String, u64>,
}

#[derive(Default)]
struct Wires {
    open: HashMap<u64, TcpStream>,
    hanging: HashSet<u64>,
    heals: u64,
    stopped: bool,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().expect("no thread has panicked in here")
}

/// Labels of a service: names and values.
pub type Labels<'a> = &'a [(&'a str, &'a str)];
/// A service: its name, its labels and the overrides of its owner.
pub type Service<'a> = (&'a str, Labels<'a>, Labels<'a>);

/// Dropping it closes the listener and all connections.
pub struct Cloud {
    addr: SocketAddr,
    shared: Arc<Shared>,
    listener: Option<JoinHandle<()>>,
}

impl Cloud {
    pub fn start(devices: Vec<Value>) -> Self {
        Self::start_at((Ipv4Addr::LOCALHOST, 0).into(), devices)
    }

    pub fn start_at(addr: SocketAddr, devices: Vec<Value>) -> Self {
        Self::start_over(addr, devices, Ok)
    }

    /// `open` makes the stream that HTTP is spoken over, and may shake hands first.
    pub fn start_over<S: Read + Write>(
        addr: SocketAddr, devices: Vec<Value>, open: impl Fn(TcpStream) -> io::Result<S> + Clone + Send + 'static,
    ) -> Self {
        let shared = Arc::new(Shared {
            devices: Mutex::new(devices),
            services: Mutex::default(),
            keys: Mutex::new(Keys { named: KEY.to_owned(), devices: HashMap::new() }),
            limit: Mutex::new(usize::MAX),
            denied: Mutex::default(),
            requests: Mutex::default(),
            came: Condvar::new(),
            interceptor: Mutex::default(),
            wires: Mutex::default(),
            healed: Condvar::new(),
        });
        let listener = TcpListener::bind(addr).expect("a free port");
        let addr = listener.local_addr().expect("an address");
        let accepting = Arc::clone(&shared);
        let listener = thread::spawn(move || {
            for (id, stream) in (0..).zip(listener.incoming()) {
                if lock(&accepting.wires).stopped {
                    break;
                }
                let Ok((wire, stream)) = stream.and_then(|stream| Wire::new(id, stream, &accepting)) else {
                    continue;
                };
                let open = open.clone();
                // An error is the end of a connection, and no more than that.
                thread::spawn(move || open(stream).and_then(|stream| wire.serve(stream)));
            }
        });
        Self { addr, shared, listener: Some(listener) }
    }

    pub fn addr(&self) -> SocketAddr {
        self.addr
    }

    pub fn url(&self) -> String {
        format!("http://{}", self.addr)
    }

    /// Edits the fleet.
    pub fn change<R>(&self, edit: impl FnOnce(&mut Vec<Value>) -> R) -> R {
        edit(&mut lock(&self.shared.devices))
    }

    /// From now on an answer has at most so many records, as behind a gateway.
    pub fn limit_answers(&self, records: usize) {
        *lock(&self.shared.limit) = records;
    }

    /// Sets the images of a release, as the API has them.
    pub fn set_images(&self, release: u64, images: Vec<Value>) {
        lock(&self.shared.services).insert(release, images);
    }

    /// The images of the release that a device runs.
    pub fn images_of(&self, device: &Value) -> Vec<Value> {
        let release = device["is_running__release"][0]["id"].as_u64().unwrap_or_default();
        lock(&self.shared.services).get(&release).cloned().unwrap_or_default()
    }

    /// Sets the services of a release, each with its labels and the overrides of its owner.
    pub fn set_services(&self, release: u64, services: &[Service]) {
        let labels = |labels: Labels| -> Value {
            labels.iter().map(|(name, value)| json!({ "label_name": name, "value": value })).collect()
        };
        let image = |(number, (name, own, overrides)): (u64, &Service)| {
            let service = json!({ "id": number, "service_name": name, "service_label": labels(overrides) });
            json!({
                "id": release * 1000 + number,
                "image": [{ "id": image_id(release, number), "is_a_build_of__service": [service] }],
                "image_label": labels(own),
            })
        };
        self.set_images(release, (1..).zip(services).map(image).collect());
    }

    pub fn add_device_key(&self, key: &str, device_id: u64) {
        lock(&self.shared.keys).devices.insert(key.to_owned(), device_id);
    }

    /// Replaces the named key.
    pub fn set_key(&self, key: &str) {
        key.clone_into(&mut lock(&self.shared.keys).named);
    }

    /// Takes a right from the named key: to read `image_install`, `service`, `image` or `release`.
    pub fn deny(&self, resource: Option<&'static str>) {
        *lock(&self.shared.denied) = resource;
    }

    /// All requests so far.
    pub fn requests(&self) -> Vec<Seen> {
        lock(&self.shared.requests).clone()
    }

    pub fn clear_requests(&self) {
        lock(&self.shared.requests).clear();
    }

    /// Waits until `n` requests have come. Each counts as soon as its answer is decided, so before the client has it.
    pub fn wait_for_requests(&self, n: usize, timeout: Duration) -> Vec<Seen> {
        let few = |requests: &mut Vec<Seen>| requests.len() < n;
        let requests = lock(&self.shared.requests);
        let waited = self.shared.came.wait_timeout_while(requests, timeout, few);
        let (requests, waited) = waited.expect("no thread has panicked in here");
        let came = requests.clone();
        drop(requests); // a panic with the lock in hand would spoil it for the connections
        assert!(!waited.timed_out(), "of {n} requests came {}: {came:#?}", came.len());
        came
    }

    /// From now on `decide` is given each request and the raw answer that is due; what it returns is sent instead.
    /// It is called by one connection at a time, and must not call `intercept` or `heal` itself.
    pub fn intercept(&self, decide: impl FnMut(&Seen, &[u8]) -> Option<Reply> + Send + 'static) {
        *lock(&self.shared.interceptor) = Some(Box::new(decide));
    }

    /// Removes the interceptor, and ends its pauses and hanging replies; a connection that hung is then closed.
    pub fn heal(&self) {
        *lock(&self.shared.interceptor) = None;
        let mut wires = lock(&self.shared.wires);
        wires.heals += 1;
        for id in &wires.hanging {
            if let Some(stream) = wires.open.get(id) {
                let _ = stream.shutdown(Shutdown::Read);
            }
        }
        self.shared.healed.notify_all();
    }

    /// The raw answer that is due to a request.
    pub fn answer(&self, seen: &Seen) -> Vec<u8> {
        self.shared.answer(seen)
    }
}

impl Drop for Cloud {
    fn drop(&mut self) {
        lock(&self.shared.wires).stopped = true;
        self.shared.healed.notify_all();
        // The listener looks at `stopped` when someone comes.
        let _ = TcpStream::connect(self.addr);
        let _ = self.listener.take().map(JoinHandle::join);
        for stream in lock(&self.shared.wires).open.values() {
            let _ = stream.shutdown(Shutdown::Both);
        }
    }
}

/// A connection, without what is spoken over it.
struct Wire {
    id: u64,
    socket: TcpStream,
    shared: Arc<Shared>,
}

impl Wire {
    fn new(id: u64, stream: TcpStream, shared: &Arc<Shared>) -> io::Result<(Self, TcpStream)> {
        stream.set_nodelay(true)?;
        stream.set_read_timeout(Some(IDLE))?;
        let socket = stream.try_clone()?;
        lock(&shared.wires).open.insert(id, stream.try_clone()?);
        let shared = Arc::clone(shared);
        Ok((Self { id, socket, shared }, stream))
    }

    fn serve(self, mut stream: impl Read + Write) -> io::Result<()> {
        let mut unread = Vec::new();
        while let Some(mut seen) = read_request(&mut stream, &mut unread)? {
            let answer = self.shared.answer(&seen);
            let heals = lock(&self.shared.wires).heals;
            let intercepted = match lock(&self.shared.interceptor).as_mut() {
                Some(decide) => decide(&seen, &answer),
                None => None,
            };
            let reply = intercepted.unwrap_or_else(|| Reply::steps([Step::Send(answer)]));
            (seen.status, seen.body) = reply.measure();
            let last = seen.closes();
            lock(&self.shared.requests).push(seen);
            self.shared.came.notify_all();
            for step in reply.0 {
                match step {
                    Step::Send(bytes) => {
                        stream.write_all(&bytes)?;
                        stream.flush()?;
                    }
                    Step::Pause(duration) => self.pause(duration, heals),
                    Step::Hang => self.hang(heals)?,
                    Step::Close => return Ok(()),
                    Step::Reset => {
                        return socket2::SockRef::from(&self.socket).set_linger(Some(Duration::ZERO));
                    }
                }
            }
            if last {
                break;
            }
        }
        Ok(())
    }

    fn pause(&self, duration: Duration, heals: u64) {
        let sick = |wires: &mut Wires| wires.heals == heals && !wires.stopped;
        let wires = lock(&self.shared.wires);
        drop(self.shared.healed.wait_timeout_while(wires, duration, sick));
    }

    /// Reads and ignores what comes, until the client closes the connection or the cloud heals or is dropped.
    fn hang(&self, heals: u64) -> io::Result<()> {
        let mut wires = lock(&self.shared.wires);
        if wires.heals != heals || wires.stopped {
            return Ok(());
        }
        wires.hanging.insert(self.id);
        drop(wires);
        self.socket.set_read_timeout(None)?;
        io::copy(&mut &self.socket, &mut io::sink()).map(drop)
    }
}

impl Drop for Wire {
    /// Forgets the last copies of the socket, which closes it.
    fn drop(&mut self) {
        let mut wires = lock(&self.shared.wires);
        wires.hanging.remove(&self.id);
        wires.open.remove(&self.id);
    }
}

/// `None` when the client has closed the connection.
pub fn read_request(stream: &mut impl Read, unread: &mut Vec<u8>) -> io::Result<Option<Seen>> {
    loop {
        let mut headers = [httparse::EMPTY_HEADER; 64];
        let mut head = httparse::Request::new(&mut headers);
        let parsed = head.parse(unread);
        let parsed = parsed.map_err(|error| io::Error::new(io::ErrorKind::InvalidData, error))?;
        if let httparse::Status::Complete(length) = parsed {
            let header = |header: &httparse::Header| {
                let value = String::from_utf8_lossy(header.value).into_owned();
                (header.name.to_lowercase(), value)
            };
            let seen = Seen {
                method: head.method.unwrap_or_default().to_owned(),
                target: head.path.unwrap_or_default().to_owned(),
                headers: head.headers.iter().map(header).collect(),
                at: Instant::now(),
                status: 0,
                body: 0,
            };
            unread.drain(..length);
            return Ok(Some(seen));
        }
        let mut more = [0; 4096];
        match stream.read(&mut more)? {
            0 => return Ok(None),
            length => unread.extend_from_slice(&more[..length]),
        }
    }
}

#[derive(PartialEq)]
enum Reader {
    User,
    Device(u64),
    Guest,
}

/// An answer before it is put into HTTP.
struct Answer {
    status: u16,
    content: Option<(&'static str, String)>,
    /// Whether it came from the database's side of the API, which forbids caching.
    resource: bool,
}

impl Answer {
    fn empty(status: u16) -> Self {
        Self { status, content: None, resource: false }
    }

    fn json(status: u16, json: String) -> Self {
        Self { content: Some(("application/json", json)), ..Self::empty(status) }
    }
}

impl Shared {
    fn reader(&self, seen: &Seen) -> Reader {
        let header = seen.header("authorization").unwrap_or_default();
        let key = header.strip_prefix("Bearer ").unwrap_or_default();
        let keys = lock(&self.keys);
        match keys.devices.get(key) {
            _ if key == keys.named => Reader::User,
            Some(id) => Reader::Device(*id),
            None => Reader::Guest,
        }
    }

    fn answer(&self, seen: &Seen) -> Vec<u8> {
        if seen.target.len() > LONGEST_TARGET {
            return (status_line(431) + "Connection: close\r\n\r\n").into_bytes();
        }
        // A load balancer adds the header; then plain HTTP must have come in by its door.
        if seen.header("x-forwarded-for").is_some() && seen.header("x-forwarded-proto") != Some("https") {
            return redirect(seen).into_bytes();
        }
        let (path, _) = seen.target.split_once('?').unwrap_or((&seen.target, ""));
        let answer = match (path, seen.target.strip_prefix("/v7")) {
            ("/ping", _) => Answer { content: Some(("text/plain", "OK".to_owned())), ..Answer::empty(200) },
            ("/actor/v1/whoami", _) => self.whoami(&self.reader(seen)),
            (_, Some(request)) if request.starts_with('/') => Answer { resource: true, ..self.resource(seen, request) },
            _ => Answer::empty(404),
        };
        encode(seen, answer)
    }

    fn whoami(&self, reader: &Reader) -> Answer {
        let devices = lock(&self.devices);
        let device = devices.iter().find(|device| reader.sees(device));
        match (reader, device) {
            (Reader::User, _) => Answer::json(
                200,
                r#"{"id":2,"actorType":"user","actorTypeId":2,"username":"admin","email":"admin@example.test"}"#
                    .to_owned(),
            ),
            // The actors of the recorded devices have numbers 5 above the devices' own.
            (Reader::Device(id), Some(device)) => Answer::json(
                200,
                format!(r#"{{"id":{},"actorType":"device","actorTypeId":{id},"uuid":{}}}"#, id + 5, device["uuid"]),
            ),
            _ => Answer::empty(401),
        }
    }

    fn resource(&self, seen: &Seen, request: &str) -> Answer {
        if seen.method != "GET" {
            return Answer::empty(500);
        }
        let Ok(mut request) = odata::parse(request) else {
            let complaint = format!("Malformed url: '{}'", seen.target);
            return Answer::json(400, Value::from(complaint).to_string());
        };
        let limit = *lock(&self.limit);
        request.query.top = Some(request.query.top.map_or(limit, |top| top.min(limit)));
        let reader = self.reader(seen);
        let resource = match request.resource.as_str() {
            "device" if reader != Reader::Guest => &DEVICE,
            "application" => &APPLICATION,
            "release" if reader != Reader::Guest => &RELEASE,
            "image_install" if reader != Reader::Guest => &IMAGE_INSTALL,
            _ => return Answer::empty(401),
        };
        let key = request.key.iter().try_for_each(|(name, _)| resource.field(name));
        match key.and_then(|()| request.query.check(resource, reader == Reader::User)) {
            Ok(()) => {}
            Err(Refused::Unknown) => return Answer::empty(500),
            Err(Refused::Forbidden) => return Answer::empty(401),
        }
        let denied = *lock(&self.denied);
        if denied == Some("image_install") && seen.target.contains("image_install") {
            return Answer::empty(401);
        }

        let devices = lock(&self.devices);
        let mut rows: Vec<&Value> = devices.iter().filter(|device| reader.sees(device)).collect();
        let releases;
        if request.resource == "release" {
            releases = running_releases(&rows, &lock(&self.services));
            rows = releases.iter().collect();
        }
        if request.resource == "application" {
            let fleets = rows.iter().filter_map(|device| device["belongs_to__application"].get(0));
            let mut known = HashSet::new();
            rows = fleets.filter(|fleet| known.insert(fleet["id"].as_u64())).collect();
        }
        let installs;
        if request.resource == "image_install" {
            installs = all_installs(&rows, denied);
            rows = installs.iter().collect();
        }
        if let Some((name, value)) = &request.key {
            rows.retain(|row| row[name] == *value);
        }
        let rows = rows.into_iter();
        let mut json = "{\"d\":".to_owned();
        if request.count {
            json += &request.query.count(rows).to_string();
        } else {
            request.query.write(resource, rows, &mut json);
        }
        Answer::json(200, json + "}")
    }
}

/// The installs of these devices, each with its device.
fn all_installs(devices: &[&Value], denied: Option<&str>) -> Vec<Value> {
    let empty = |row: &mut Value, link: &str| row[link] = json!([]);
    let of_device = |device: &Value| {
        let owner = json!([{ "id": device["id"], "belongs_to__application": device["belongs_to__application"],
            "device_tag": device["device_tag"] }]);
        let installs = device["image_install"].as_array().cloned().unwrap_or_default();
        installs.into_iter().map(move |mut row| {
            row["device"] = owner.clone();
            match denied {
                Some("service") => empty(&mut row["installs__image"][0], "is_a_build_of__service"),
                Some("image") => empty(&mut row, "installs__image"),
                Some("release") => empty(&mut row, "is_provided_by__release"),
                _ => {}
            }
            row
        })
    };
    let have_some = devices.iter().filter(|device| device["image_install"].get(0).is_some());
    have_some.flat_map(|device| of_device(device)).collect()
}

/// The releases that the devices run, by rising id. Of the devices that run a release, one of each fleet represents all.
fn running_releases(devices: &[&Value], services: &HashMap<u64, Vec<Value>>) -> Vec<Value> {
    let mut releases: BTreeMap<u64, Value> = BTreeMap::new();
    for device in devices {
        let Some(release) = device["is_running__release"].get(0) else { continue };
        let Some(id) = release["id"].as_u64() else { continue };
        let fleet = &device["belongs_to__application"];
        let row = releases.entry(id).or_insert_with(|| {
            let mut row = release.clone();
            row["belongs_to__application"] = fleet.clone();
            row["release_image"] = services.get(&id).cloned().unwrap_or_default().into();
            row["is_running_on__device"] = Value::Array(Vec::new());
            row
        });
        let known = row["is_running_on__device"].as_array_mut().expect("a list");
        if known.iter().all(|known| known["belongs_to__application"] != *fleet) {
            known.push(json!({ "id": device["id"], "belongs_to__application": fleet }));
        }
    }
    releases.into_values().collect()
}

impl Reader {
    fn sees(&self, device: &Value) -> bool {
        match self {
            Self::User => true,
            Self::Device(id) => device["id"] == *id,
            Self::Guest => false,
        }
    }
}

/// It never changes, so that equal answers have equal bytes.
const DATE: &str = "Date: Sun, 22 Nov 2026 06:59:36 GMT\r\n";

fn status_line(status: u16) -> String {
    let reason = match status {
        200 => "OK",
        301 => "Moved Permanently",
        304 => "Not Modified",
        400 => "Bad Request",
        401 => "Unauthorized",
        404 => "Not Found",
        429 => "Too Many Requests",
        431 => "Request Header Fields Too Large",
        500 => "Internal Server Error",
        502 => "Bad Gateway",
        503 => "Service Unavailable",
        _ => "Unknown",
    };
    format!("HTTP/1.1 {status} {reason}\r\n")
}

fn connection(seen: &Seen) -> &'static str {
    if seen.closes() { "Connection: close\r\n" } else { "Connection: keep-alive\r\nKeep-Alive: timeout=5\r\n" }
}

fn redirect(seen: &Seen) -> String {
    let location = format!("https://{}{}", seen.header("host").unwrap_or_default(), seen.target);
    let body = format!("Moved Permanently. Redirecting to {location}");
    let head = format!(
        "Location: {location}\r\nVary: Accept\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {}\r\n",
        body.len()
    );
    status_line(301) + &head + DATE + connection(seen) + "\r\n" + &body
}

/// Express's weak ETag.
fn etag(body: &str) -> String {
    let hash = BASE64_STANDARD.encode(Sha1::digest(body));
    format!("W/\"{:x}-{}\"", body.len(), &hash[..27])
}

pub fn gzip(body: &[u8], level: Compression) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), level);
    encoder.write_all(body).and_then(|()| encoder.finish()).expect("memory takes it")
}

/// Puts an answer into HTTP, with the headers in Express's order.
fn encode(seen: &Seen, answer: Answer) -> Vec<u8> {
    let cache = if answer.resource { "Cache-Control: no-cache\r\n" } else { "" };
    let etag = answer.content.as_ref().map(|(_, body)| etag(body));
    if let Some(etag) = etag.as_ref().filter(|etag| answer.status == 200 && seen.has(etag)) {
        let head = format!("{cache}ETag: {etag}\r\n");
        return (status_line(304) + &head + DATE + connection(seen) + "\r\n").into_bytes();
    }

    let mut head = status_line(answer.status)
        + "X-Frame-Options: DENY\r\n\
           X-Content-Type-Options: nosniff\r\n\
           Access-Control-Allow-Origin: *\r\n\
           Access-Control-Allow-Credentials: true\r\n\
           Access-Control-Expose-Headers: Retry-After\r\n"
        + cache;
    let mut sent = Vec::new();
    let mut chunked = answer.content.is_none();
    if let (Some((media, body)), Some(etag)) = (answer.content, etag) {
        head += &format!("Content-Type: {media}; charset=utf-8\r\n");
        let json = media == "application/json";
        if json && body.len() >= LEAST_COMPRESSED && seen.takes_gzip() {
            head += "Content-Encoding: gzip\r\n";
            sent = gzip(body.as_bytes(), Compression::default());
            sent = [format!("{:x}\r\n", sent.len()).as_bytes(), &sent, b"\r\n"].concat();
            chunked = true;
        } else {
            head += &format!("Content-Length: {}\r\n", body.len());
            sent = body.into_bytes();
        }
        head += &format!("ETag: {etag}\r\n");
        head += if json { "Vary: Accept-Encoding\r\n" } else { "" };
    }
    head += DATE;
    head += connection(seen);
    if seen.method == "HEAD" {
        return (head + "\r\n").into_bytes();
    }
    if chunked {
        head += "Transfer-Encoding: chunked\r\n";
        sent.extend_from_slice(b"0\r\n\r\n");
    }
    head += "\r\n";
    [head.into_bytes(), sent].concat()
}
