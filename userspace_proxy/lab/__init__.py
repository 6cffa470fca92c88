"""Virtual hosts, servers and clients on this machine, for the demo, the comparison and the tests."""

from userspace_proxy.lab.clients import ask, connect
from userspace_proxy.lab.hosts import (
    CLIENT_IP,
    CLIENT_IP6,
    NODE_IP,
    NODE_IP6,
    Host,
    Lab,
    ServiceLab,
    build_service_lab,
    command_in_namespaces,
    enter_namespaces,
    inside,
    ip,
    prepare,
)
from userspace_proxy.lab.servers import HTTP_PORT, last_line, service, start_nginx, start_proxy, wait_until
