// NNI's server gives Node a port and no host, which means every interface. Loaded ahead of it with
// NODE_OPTIONS='--require "/path/to/loopback.js"', this adds the host.
const { Server } = require('net');
const listen = Server.prototype.listen;
Server.prototype.listen = function (port, ...rest) {
    const hostMissing = typeof port === 'number' && typeof rest[0] !== 'string';
    return hostMissing ? listen.call(this, port, '127.0.0.1', ...rest) : listen.call(this, port, ...rest);
};
