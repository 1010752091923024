// Connects the drawing surface to the traits of an anywidget (vlmbench.demo.canvas).
export default {
  render({ model, el }) {
    const canvas = mountCanvas(el, model.get('settings'), {
      marks: m => {
        model.set('marks', m);
        model.save_changes();
      },
      insert: text => model.send({ insert: text }),
      open: async file => {
        const limit = model.get('settings').max_bytes;
        if (file.size > limit) {
          const most = Math.floor(limit / 1e6);
          return canvas.message(`${file.name} is larger than ${most} MB`, true);
        }
        model.send({ open: file.name }, undefined, [await file.arrayBuffer()]);
      },
    });
    const show = () => canvas.setImage(model.get('image'), ...model.get('size'));
    model.on('change:image', show);
    model.on('change:marks', () => canvas.setMarks(model.get('marks')));
    model.on('change:note', () => canvas.message(model.get('note'), true));
    show();
    canvas.setMarks(model.get('marks'));
  },
};
