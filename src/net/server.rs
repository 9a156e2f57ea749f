//! The servers of the program: listening, the one accept loop, and what the endpoints of both services share.

use std::convert::Infallible;
use std::error::Error;
use std::io;
use std::net::{Ipv6Addr, SocketAddr, TcpListener, ToSocketAddrs};
use std::sync::{Arc, Weak};
use std::time::Duration;

use http_body_util::BodyExt;
use hyper::body::{Body, Incoming};
use hyper::header::{CONTENT_TYPE, HeaderValue};
use hyper::server::conn::http1;
use hyper::service::service_fn;
use hyper::{Request, Response, StatusCode};
use hyper_util::rt::{TokioIo, TokioTimer};
use socket2::{Domain, Socket, Type};
use tokio::net::TcpStream;
use tokio::sync::{OwnedSemaphorePermit, Semaphore};
use tokio::task::AbortHandle;
use tokio::time::{sleep, timeout};

use crate::net::cannot_start::CannotStart;
use crate::values::BadValue;

/// How long bytes may wait for a client that does not read, in milliseconds.
#[cfg(target_os = "linux")]
const SEND_TIMEOUT: u32 = 60_000;
/// The most headers of a request. Memory for all of them is reserved while a head is parsed.
pub const MAX_HEADERS: usize = 1024;
/// Connections that wait to be accepted. The system has its own limit as well.
const BACKLOG: i32 = 4096;
/// The wait between two tries to accept a connection or to find a place for it.
const RETRY_INTERVAL: Duration = Duration::from_millis(100);
/// The content type of text for people.
pub const TEXT: &str = "text/plain; charset=utf-8";

/// Reads `host:port`, or `:port` for all interfaces, as the addresses to try in this order.
pub fn addresses(text: &str) -> Result<Vec<SocketAddr>, BadValue> {
    const BAD_FORM: &str = "not host:port or :port";
    if let Some(port) = text.strip_prefix(':') {
        // The second one is for hosts without IPv6.
        let all = ["[::]", "0.0.0.0"].map(|host| format!("{host}:{port}").parse());
        return all.into_iter().collect::<Result<_, _>>().map_err(|_| BAD_FORM.into());
    }
    if text.contains(|c: char| !c.is_ascii_alphanumeric() && !"-._:[]%".contains(c)) {
        return Err(BAD_FORM.into()); // such as a URL
    }
    let (host, port) = text.rsplit_once(':').ok_or(BAD_FORM)?;
    let port: u16 = port.parse().map_err(|_| BAD_FORM)?;
    let host = host.trim_matches(['[', ']']); // with them, the standard library takes no zone such as %eth0
    let address = host.split_once('%').map_or(host, |(address, _)| address); // the zone may follow
    if host.contains(':') && address.parse::<Ipv6Addr>().is_err() {
        return Err(BAD_FORM.into()); // no name has a colon
    }
    let unknown = |error| BadValue { may_pass: true, ..format!("the host's name cannot be resolved: {error}").into() };
    (host, port).to_socket_addrs().map(Iterator::collect).map_err(unknown)
}

/// Listens on the first of these addresses that is free, for use with tokio. `variable` is the option that has them.
///
/// # Errors
/// None of them can be used.
pub fn listen(addresses: &[SocketAddr], variable: &'static str) -> Result<TcpListener, CannotStart> {
    let mut result = Err(io::Error::other("no address"));
    for address in addresses {
        result = bind(*address);
        if result.is_ok() {
            break;
        }
    }
    result.map_err(|error| CannotStart::Listen { addresses: addresses.into(), variable, error })
}

fn bind(address: SocketAddr) -> io::Result<TcpListener> {
    let socket = Socket::new(Domain::for_address(address), Type::STREAM, None)?;
    if address.is_ipv6() && address.ip().is_unspecified() {
        // All interfaces are those of IPv4 too, even where net.ipv6.bindv6only is 1.
        socket.set_only_v6(false)?;
    }
    // A restart need not wait for the connections of the last run.
    socket.set_reuse_address(true)?;
    socket.bind(&address.into())?;
    socket.listen(BACKLOG)?;
    socket.set_nonblocking(true)?;
    Ok(socket.into())
}

/// The bounds of a server.
#[derive(Clone, Copy)]
pub struct Limits {
    /// The most connections at once.
    pub connections: usize,
    /// From the start of a connection, or the end of an answer, to the end of the next request's head.
    pub head_timeout: Duration,
    /// The largest head of a request, in bytes.
    pub max_head: usize,
    /// If set, a connection closes after one request, and this is the limit for the request and its answer.
    ///
    /// Where all connections are in use, the oldest one closes to make room: with this limit whatever it does, since answers are
    /// made at once, so an old connection is an idle or slow one; without it only if it waits for a request.
    pub single: Option<Duration>,
}

/// Accepts connections and answers their requests, on a current-thread runtime. `failed` gets the errors of connections:
/// the client went away, was too slow, or did not speak HTTP.
pub async fn serve<H, F, B, E>(listener: TcpListener, limits: Limits, handler: H, failed: E) -> io::Result<Infallible>
where
    E: Fn(&hyper::Error) + Clone + Send + 'static,
    H: Fn(Request<Incoming>) -> F + Clone + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Error: Into<Box<dyn Error + Send + Sync>>, Data: Send> + Send + Unpin + 'static,
{
    let listener = tokio::net::TcpListener::from_std(listener)?;
    let places = Arc::new(Semaphore::new(limits.connections));
    let mut connections = Vec::new();
    loop {
        let Ok((stream, _)) = listener.accept().await else {
            // most likely the process has no file descriptor left
            close_one(&mut connections);
            sleep(RETRY_INTERVAL).await;
            continue;
        };
        let place = place(&places, &mut connections).await?;
        let _ = stream.set_nodelay(true); // a failure costs some time only
        #[cfg(target_os = "linux")]
        let _ = rustix::net::sockopt::set_tcp_user_timeout(&stream, SEND_TIMEOUT);
        let (in_use, handler, failed) = (Arc::new(()), handler.clone(), failed.clone());
        let users = Arc::downgrade(&in_use);
        let task = tokio::spawn(async move {
            if let Err(error) = converse(stream, limits, in_use, handler).await {
                failed(&error);
            }
            drop(place);
        });
        connections.retain(Connection::is_open);
        connections.push(Connection { task: task.abort_handle(), users });
    }
}

/// A connection that may be closed to make room.
struct Connection {
    task: AbortHandle,
    /// The connection itself, and each answer in which it must not be closed.
    users: Weak<()>,
}

impl Connection {
    fn is_open(&self) -> bool {
        !self.task.is_finished()
    }
}

async fn place(places: &Arc<Semaphore>, connections: &mut Vec<Connection>) -> io::Result<OwnedSemaphorePermit> {
    if let Ok(place) = places.clone().try_acquire_owned() {
        return Ok(place);
    }
    loop {
        close_one(connections);
        if let Ok(place) = timeout(RETRY_INTERVAL, places.clone().acquire_owned()).await {
            return place.map_err(io::Error::other);
        }
    }
}

/// Closes the oldest connection that may be closed.
fn close_one(connections: &mut Vec<Connection>) {
    connections.retain(Connection::is_open);
    if let Some(idle) = connections.iter().position(|connection| connection.users.strong_count() < 2) {
        connections.remove(idle).task.abort();
    }
}

async fn converse<H, F, B>(stream: TcpStream, limits: Limits, in_use: Arc<()>, handler: H) -> hyper::Result<()>
where
    H: Fn(Request<Incoming>) -> F + Send + 'static,
    F: Future<Output = Response<B>> + Send + 'static,
    B: Body<Error: Into<Box<dyn Error + Send + Sync>>, Data: Send> + Send + Unpin + 'static,
{
    let answer = service_fn(move |request| {
        let in_use = limits.single.is_none().then(|| in_use.clone());
        // in a box, since the connection reserves room for it while it waits
        let answer = Box::pin(handler(request));
        // The body has it until its end, although it has nothing to do with errors.
        let keep = move |error| {
            let _ = &in_use;
            error
        };
        async { Ok::<_, Infallible>(answer.await.map(|body| body.map_err(keep))) }
    });
    let mut http = http1::Builder::new();
    http.timer(TokioTimer::new()).header_read_timeout(limits.head_timeout).keep_alive(limits.single.is_none());
    http.max_buf_size(limits.max_head).max_headers(MAX_HEADERS);
    let connection = http.serve_connection(TokioIo::new(stream), answer).with_upgrades();
    match limits.single {
        Some(longest) => timeout(longest, connection).await.unwrap_or(Ok(())),
        None => connection.await,
    }
}

pub fn reply<B: Body>(status: StatusCode, kind: &'static str, body: impl Into<B>) -> Response<B> {
    let mut answer = Response::new(body.into());
    *answer.status_mut() = status;
    answer.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(kind));
    answer
}
